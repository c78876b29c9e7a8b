"""Steps in closed form that a guided search tries before gradients: grids and roundings of weights."""

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from cptv_jax.calibration.error_feedback import adjust_by_input, ridge
from cptv_jax.calibration.moments import Batch, Moments, extended, layers_of, moments_by_stage
from cptv_jax.calibration.observers import fit, update
from cptv_jax.interpreters import effective_weight, quantize_weight
from cptv_jax.quantized.model import QuantizedModel
from cptv_jax.quantizers import BiasCorrected, Quantizer, Uniform, innermost, offsets, spread, with_rounding
from cptv_jax.search.proposals.base import Scales

_LARGEST_FACTOR = 2.0  # by which a channel is made longer or shorter
_RIDGE = 0.01  # of the mean square of what a layer reads
_NOISE = 1e-5  # of a sum of squares in float32, relative to it
_ROUNDED = 1e-3  # of a step: how far from its grid a weight may be that was rounded to it
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


def steps_to_least_output_error(
    base: QuantizedModel,
    scales: Scales,
    batches: Iterable[Batch],
    on_layer: Callable[[str], None] = lambda name: None,
) -> Scales:
    """Steps, by stage, from the candidates `scales` to roundings (GPTQ, arXiv 2210.17323) and channel factors by which
    each layer's output on quantized inputs comes close to that of the float layer on float ones.

    batches: normalised calibration images, all of which are in memory one stage at a time. on_layer(name): called
    before a layer is rounded. Zero for weights whose rounding is not searched, for those with a float term beside them,
    and for those that their grid holds exactly.
    """
    steps = {name: {key: jnp.zeros_like(value) for key, value in parts.items()} for name, parts in scales.items()}
    searched = {f"{stage}.{key}": value for stage, candidate in scales.items() for key, value in candidate.items()}
    moved = base.with_parameters(searched)
    layers = [
        layer
        for layer in layers_of(base.model, base.recipe)
        if f"{layer.name}.weight.rounding" in searched
        and isinstance(moved.quantizers[f"{layer.name}.weight"], Uniform | BiasCorrected)
        and not _on_grid(moved, layer.name)
    ]
    if not layers:
        return steps
    for found in moments_by_stage(base.model, batches, layers, base.quantizers):
        for name, moments in found.items():
            on_layer(name)
            for key, value in _rounded_anew(moved, name, moments).items():
                stage = next(stage for stage in scales if name.startswith(f"{stage}."))
                own = f"{name.removeprefix(f'{stage}.')}.weight.{key}"
                if own in scales[stage]:
                    old = np.asarray(scales[stage][own], np.float64)
                    change = np.log(value / old) if key == "factor" else value - old
                    steps[stage][own] = jnp.asarray(change, jnp.float32)
    return steps


class _Grid(NamedTuple):
    """A uniform grid a channel, on the host in float64."""

    scale: Float[np.ndarray, "..."]
    zero_point: Float[np.ndarray, "..."]
    low: Float[np.ndarray, ""]
    high: Float[np.ndarray, ""]

    def positions(self, values: Float[np.ndarray, "..."]) -> Float[np.ndarray, "..."]:
        """Codes before rounding."""
        return np.clip(values / self.scale + self.zero_point, self.low, self.high)

    def nearest(self, values: Float[np.ndarray, "..."]) -> Float[np.ndarray, "..."]:
        return (np.round(self.positions(values)) - self.zero_point) * self.scale


def _grid_of(quantizer: Quantizer, kernel: Float[Array, "inputs outputs"]) -> _Grid:
    grid = innermost(quantizer)
    parts = (grid.scale, grid.zero_point, grid.low, grid.high)
    return _Grid(*(np.asarray(spread(jnp.asarray(part), kernel), np.float64) for part in parts))


def _on_grid(model: QuantizedModel, layer: str) -> bool:
    """Whether a weight rounds to itself, as one does that a base method has rounded already."""
    kernel = model.model.layer(layer)["kernel"]
    grid = _grid_of(model.quantizers[f"{layer}.weight"], kernel)
    error = grid.nearest(np.asarray(kernel, np.float64)) - np.asarray(kernel, np.float64)
    return bool(np.all(np.abs(error) <= _ROUNDED * grid.scale))


def _rounded_anew(model: QuantizedModel, name: str, moments: Moments) -> dict[str, Float[np.ndarray, "..."]]:
    """Parameters "rounding" and "factor" of a layer's weight."""
    layer, quantizer = model.model.layer(name), model.quantizers[f"{name}.weight"]
    kernel, grid = np.asarray(layer["kernel"], np.float64), _grid_of(quantizer, layer["kernel"])
    gram, cross = (np.asarray(x, np.float64) / float(moments.gram[-1, -1]) for x in (moments.gram, moments.cross))
    moment = gram[:-1, :-1]
    level = np.trace(moment) / len(moment)
    # Weights that on quantized inputs come closest to the float outputs, which roundings then stay close to. The bias
    # that belongs to them is not taken: with it, models generalize no better (docs/results.md, "What did not help").
    inputs = len(extended(layer))
    wanted = kernel + ridge(gram[:inputs, :inputs], cross[:inputs], max(_RIDGE * level, _TINY))[: len(kernel)]
    felt = moment
    if isinstance(quantizer, BiasCorrected):  # a channel's errors sum to nothing: what its inputs share does not count
        felt = moment - moment.mean(0) - moment.mean(0)[:, None] + moment.mean() + _NOISE * level * np.eye(len(moment))
    adjusted = adjust_by_input(wanted, grid.nearest, felt)
    # Within the codes, where gradients can still move it.
    rounding = grid.positions(adjusted) - grid.zero_point - kernel / grid.scale
    quantizer = with_rounding(quantizer, jnp.asarray(rounding, jnp.float32))
    found = {"rounding": np.asarray(offsets(quantizer)["rounding"], np.float64)}
    if "factor" in offsets(quantizer):
        old = np.asarray(offsets(quantizer)["factor"], np.float64)
        rounded = np.asarray(_effective(quantizer, layer["kernel"]), np.float64)
        against, squares = (np.sum(rounded * (moment @ other), 0) for other in (wanted, rounded))
        if old.ndim == 0:  # one for all channels
            against, squares = against.sum(), squares.sum()
        # Where hardly anything is read, sums in float32 say nothing of it.
        known = squares > _NOISE * level * np.sum(rounded**2, 0 if old.ndim else None)
        factor = np.where(known, against / np.maximum(squares, _TINY), 1.0)
        found["factor"] = old * np.clip(factor, 1 / _LARGEST_FACTOR, _LARGEST_FACTOR)
    return found


@jax.jit
def _effective(quantizer: Quantizer, kernel: Float[Array, "inputs outputs"]) -> Float[Array, "inputs outputs"]:
    return effective_weight(quantize_weight(quantizer, kernel))
