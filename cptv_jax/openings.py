"""Steps in closed form that a guided search tries before gradients: grids and roundings of weights."""

from collections.abc import Iterable, Mapping
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from cptv_jax.interpreters import effective_weight, quantize_weight
from cptv_jax.methods.compensation import adjust_by_column
from cptv_jax.methods.moments import Batch, Moments, collect_moments, layers_of
from cptv_jax.observers import fit, update
from cptv_jax.quantized import QuantizedModel, movable_biases
from cptv_jax.quantizers import (
    BiasCorrected,
    Quantizer,
    Uniform,
    innermost,
    offsets,
    spread,
    with_parameters,
    with_rounding,
)
from cptv_jax.search.run import Scales

_LARGEST_FACTOR = 2.0  # by which a channel is made longer or shorter
_TINY = float(np.finfo(np.float32).tiny)


def steps_to_least_error(base: QuantizedModel, scales: Scales) -> Scales:
    """Steps, by stage, from the candidates `scales` to grids of least squared error (OMSE), a channel at a time.

    They need no data, and are zero for what has no uniform grid a channel.
    """
    steps = {}
    for stage, candidate in scales.items():
        steps[stage] = {key: jnp.zeros_like(value) for key, value in candidate.items()}
        for site in (key for key in candidate if key.endswith(".weight")):
            name = f"{stage}.{site}"
            spec = replace(base.recipe.sites[name], observer="omse", per_channel=False)
            kernel = base.model.layer(name.removesuffix(".weight"))["kernel"]
            if spec.quantizer != "uniform" or np.shape(candidate[site]) != kernel.shape[1:]:
                continue
            fitted = jax.vmap(lambda x, spec=spec: fit(spec, update(spec, None, x), x), 1)(kernel)
            steps[stage][site] = jnp.log(fitted.scale / candidate[site])
            for offset, value in offsets(fitted).items():
                if f"{site}.{offset}" in candidate:
                    steps[stage][f"{site}.{offset}"] = value - candidate[f"{site}.{offset}"]
    return steps


def steps_to_least_output_error(base: QuantizedModel, scales: Scales, batches: Iterable[Batch]) -> Scales:
    """Steps, by stage, from the candidates `scales` to roundings, channel factors and biases with little error of each
    layer's output, a layer at a time (roundings: GPTQ, arXiv 2210.17323).

    batches: normalised calibration images. Zero for weights whose rounding is not searched, for those with a float term
    beside them, and for those that their grid holds exactly.
    """
    steps = {name: {key: jnp.zeros_like(value) for key, value in parts.items()} for name, parts in scales.items()}
    quantizers = {}  # as the candidates have them
    for stage, candidate in scales.items():
        for site in (key for key in candidate if f"{key}.rounding" in candidate):
            own = {key.removeprefix(f"{site}."): candidate[key] for key in candidate if key.startswith(f"{site}.")}
            quantizer = with_parameters(base.quantizers[f"{stage}.{site}"], {"scale": candidate[site], **own})
            if isinstance(quantizer, Uniform | BiasCorrected):
                quantizers[f"{stage}.{site}"] = quantizer
    layers = [layer for layer in layers_of(base.model, base.recipe) if f"{layer.name}.weight" in quantizers]
    moments = collect_moments(base.model, batches, layers, base.quantizers) if layers else {}
    for stage, candidate in scales.items():
        for site in (key for key in candidate if f"{stage}.{key}" in quantizers):
            found = _rounded_anew(base, stage, site, quantizers[f"{stage}.{site}"], moments)
            for name, value in found.items():
                key = f"{site}.{name}"
                if key in candidate:
                    change = jnp.log(value / candidate[key]) if name == "factor" else value - candidate[key]
                    steps[stage][key] = jnp.asarray(change, jnp.float32)
    return steps


def _rounded_anew(
    base: QuantizedModel, stage: str, site: str, quantizer: Uniform | BiasCorrected, moments: Mapping[str, Moments]
) -> dict[str, Array]:
    """A weight's parameters "rounding", "factor" and "bias" by which its layer's output comes close to the float one,
    or none where rounding changes nothing."""
    name = f"{stage}.{site.removesuffix('.weight')}"
    layer = base.model.layer(name)
    kernel = np.asarray(layer["kernel"], np.float64)
    grid = innermost(quantizer)
    scale, zero_point, low, high = (
        np.asarray(spread(x, layer["kernel"]), np.float64) for x in (grid.scale, grid.zero_point, grid.low, grid.high)
    )

    def nearest(row: np.ndarray) -> np.ndarray:
        return (np.clip(np.round(row / scale + zero_point), low, high) - zero_point) * scale

    gram, cross = (
        np.asarray(sums, np.float64) / float(moments[name].gram[-1, -1])
        for sums in (moments[name].gram, moments[name].cross)
    )
    means, moment = gram[-1, :-1], gram[:-1, :-1]
    biases = movable_biases(base.model.weights[stage], [site])
    if biases:  # which take up what all rows of inputs have in common
        moment = moment - np.outer(means, means)
    corrected = isinstance(quantizer, BiasCorrected)
    # With bias correction a channel's errors sum to nothing, so what all its inputs have in common does not count.
    felt = moment - moment.mean(0) - moment.mean(0)[:, None] + moment.mean() if corrected else moment
    adjusted = adjust_by_column(kernel, nearest, felt)
    if np.allclose(adjusted, kernel, rtol=0, atol=1e-3 * scale.min()):
        return {}
    quantizer = with_rounding(quantizer, jnp.asarray((adjusted - kernel) / scale, jnp.float32))
    found = {"rounding": offsets(quantizer)["rounding"]}
    rounded = np.asarray(_effective(quantizer, layer["kernel"]), np.float64)
    if "factor" in offsets(quantizer):
        against, squares = (np.sum(rounded * (moment @ other), 0) for other in (kernel, rounded))
        factor = np.clip(against / np.maximum(squares, _TINY), 1 / _LARGEST_FACTOR, _LARGEST_FACTOR)
        found["factor"] = offsets(quantizer)["factor"] * factor
        rounded = factor * rounded
    for bias in biases.values():
        found["bias"] = (means @ (kernel - rounded) + cross[-1]) / np.maximum(bias.unit, _TINY)
    return found


@jax.jit
def _effective(quantizer: Quantizer, kernel: Float[Array, "inputs outputs"]) -> Float[Array, "inputs outputs"]:
    return effective_weight(quantize_weight(quantizer, kernel))
