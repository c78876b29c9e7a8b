"""Closed-form proposals of a guided search, tried before gradients: grids and roundings of weights."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from cptv_jax.calibration.error_feedback import adjust_by_input, ridge
from cptv_jax.calibration.moments import Batch, Moments, append_bias, layers_of, moments_by_stage
from cptv_jax.calibration.observers import fit, update
from cptv_jax.interpreters import effective_weight, quantize_weight
from cptv_jax.quantized.layers import stage_sites
from cptv_jax.quantized.model import QuantizedModel
from cptv_jax.quantizers import BiasCorrected, Free, Quantizer, Uniform, spread, unwrap
from cptv_jax.recipe.sites import Site
from cptv_jax.search.proposals.base import Scales

_FITTED = ("factor", "start", "zero_point")  # fields of a grid of least error, in addition to its scale
_LARGEST_FACTOR = 2.0  # by which a channel is made longer or shorter
_RIDGE = 0.01  # of the mean square of what a layer reads
_NOISE = 1e-5  # of a sum of squares in float32, relative to it
_ROUNDED = 1e-3  # of a step: how far from its grid a weight may be that was rounded to it
_TINY = float(np.finfo(np.float32).tiny)


def steps_to_least_error(base: QuantizedModel, scales: Scales) -> Scales:
    """Computes steps to uniform grids of least squared error (OMSE), channel by channel. They need no data.

    Args:
        base: The model that is searched.
        scales: Its present candidates by stage.

    Returns:
        Steps in the structure of the candidates; zero for weights without a uniform grid for each channel.
    """
    steps = jax.tree.map(jnp.zeros_like, scales)
    for stage, candidate in scales.items():
        for site in _weights_of(base, stage, candidate):
            own = candidate[site.local]
            spec = replace(base.recipe.sites[site.name], observer="omse", per_channel=False)
            kernel = base.model.layer(site.layer_name)["kernel"]
            if spec.quantizer != "uniform" or np.shape(own.scale) != kernel.shape[1:]:
                continue
            fitted = jax.vmap(lambda x, spec=spec: fit(spec, update(spec, None, x), x), 1)(kernel).free()
            found = {"scale": jnp.log(fitted.scale / own.scale)}
            for name in set(_FITTED).intersection(fitted.names, own.names):
                found[name] = getattr(fitted, name) - getattr(own, name)
            steps[stage][site.local] = replace(steps[stage][site.local], **found)
    return steps


def _weights_of(base: QuantizedModel, stage: str, candidate: Mapping[str, Free]) -> list[Site]:
    """The weights among a candidate's sites."""
    sites = stage_sites(base.model.architecture)[stage]
    return [sites[local] for local in candidate if sites[local].role == "weight"]


def steps_to_least_output_error(
    base: QuantizedModel,
    scales: Scales,
    batches: Iterable[Batch],
    on_layer: Callable[[str], None] = lambda name: None,
) -> Scales:
    """Computes steps to roundings and channel factors that keep the outputs of layers.

    With them (roundings by GPTQ, arXiv 2210.17323), each layer's output on quantized inputs comes close to that of the
    float layer on float inputs.

    Args:
        base: The model that is searched.
        scales: Its present candidates by stage.
        batches: Normalised calibration images, all of which are in memory one stage at a time.
        on_layer: Called with a layer's name before it is rounded.

    Returns:
        Steps in the structure of the candidates; zero for weights whose rounding is not searched, for those with an
        additional float term, and for those that their grid holds exactly.
    """
    steps = jax.tree.map(jnp.zeros_like, scales)
    moved = base.with_candidates(scales)
    searched = {
        site.layer_name: site
        for stage, candidate in scales.items()
        for site in _weights_of(base, stage, candidate)
        if candidate[site.local].rounding is not None
    }
    layers = [
        layer
        for layer in layers_of(base.model, base.recipe)
        if layer.name in searched
        and isinstance(moved.quantizers[searched[layer.name].name], Uniform | BiasCorrected)
        and not _on_grid(moved, searched[layer.name])
    ]
    if not layers:
        return steps
    for found in moments_by_stage(base.model, batches, layers, base.quantizers):
        for layer_name, moments in found.items():
            on_layer(layer_name)
            site = searched[layer_name]
            present, changes = scales[site.stage][site.local], {}
            for name, value in _round_again(moved, site, moments).items():
                if getattr(present, name) is not None:
                    old = np.asarray(getattr(present, name), np.float64)
                    change = np.log(value / old) if name == "factor" else value - old
                    changes[name] = jnp.asarray(change, jnp.float32)
            steps[site.stage][site.local] = replace(steps[site.stage][site.local], **changes)
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
    grid = unwrap(quantizer)
    parts = (grid.scale, grid.zero_point, grid.low, grid.high)
    return _Grid(*(np.asarray(spread(jnp.asarray(part), kernel), np.float64) for part in parts))


def _on_grid(model: QuantizedModel, weight: Site) -> bool:
    """Whether a weight rounds to itself, as one does that a base method has rounded already."""
    kernel = model.model.layer(weight.layer_name)["kernel"]
    grid = _grid_of(model.quantizers[weight.name], kernel)
    error = grid.nearest(np.asarray(kernel, np.float64)) - np.asarray(kernel, np.float64)
    return bool(np.all(np.abs(error) <= _ROUNDED * grid.scale))


def _round_again(model: QuantizedModel, weight: Site, moments: Moments) -> dict[str, Float[np.ndarray, "..."]]:
    """The fields "rounding" and "factor" of a weight's Free."""
    layer, quantizer = model.model.layer(weight.layer_name), model.quantizers[weight.name]
    kernel, grid = np.asarray(layer["kernel"], np.float64), _grid_of(quantizer, layer["kernel"])
    gram, cross = (np.asarray(x, np.float64) / float(moments.gram[-1, -1]) for x in (moments.gram, moments.cross))
    moment = gram[:-1, :-1]
    level = np.trace(moment) / len(moment)
    # Weights that on quantized inputs come closest to the float outputs, which roundings then stay close to. The bias
    # that belongs to them is not taken: with it, models generalize no better (docs/results.md, "What did not help").
    inputs = len(append_bias(layer))
    wanted = kernel + ridge(gram[:inputs, :inputs], cross[:inputs], max(_RIDGE * level, _TINY))[: len(kernel)]
    felt = moment
    if isinstance(quantizer, BiasCorrected):  # a channel's errors sum to nothing: what its inputs share does not count
        felt = moment - moment.mean(0) - moment.mean(0)[:, None] + moment.mean() + _NOISE * level * np.eye(len(moment))
    adjusted = adjust_by_input(wanted, grid.nearest, felt)
    # Within the codes, where gradients can still move it.
    rounding = grid.positions(adjusted) - grid.zero_point - kernel / grid.scale
    quantizer = quantizer.with_rounding(jnp.asarray(rounding, jnp.float32))
    free = quantizer.free()
    found = {"rounding": np.asarray(free.rounding, np.float64)}
    if free.factor is not None:
        old = np.asarray(free.factor, np.float64)
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
