"""Calibration shared by the methods that fit every quantizer from statistics of a float forward pass."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
from flax import nnx
from jaxtyping import Array, Float, PyTree

from cptv_jax.calibration import observers
from cptv_jax.calibration.observers import Range
from cptv_jax.interpreters import Observing, Tensor
from cptv_jax.models.architecture import call_stage, stage_graphs
from cptv_jax.quantized.model import Model
from cptv_jax.quantizers import Quantizer
from cptv_jax.recipe.spec import Recipe, SiteSpec


def _observe(
    graph: nnx.GraphDef[Any],
    fit: bool,
    log_int_softmax: bool,
    specs: dict[str, SiteSpec],
    weights: PyTree,
    ranges: dict[str, Range],
    x: PyTree,
) -> tuple[PyTree, dict[str, Range], dict[str, Quantizer]]:
    ops = Observing(observers, specs, ranges, fit=fit, log_int_softmax=log_int_softmax)
    output = call_stage(graph, ops, weights, x)
    return output, ops.ranges, ops.fitted


_observe_stage = jax.jit(_observe, static_argnums=(0, 1, 2))


def calibrate(
    model: Model,
    batches: Sequence[Float[Array, "batch height width channels"]],
    recipe: Recipe,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Quantizer]:
    """Quantizers of every site in the recipe, from a float forward pass over the batches.

    Ranges come from all batches; scores (OMSE, power-of-two factor) from the last one alone, as FQ-ViT and Evol-Q do.
    One batch and one stage are in memory at a time. on_progress(done, total) counts stages run.
    """
    graphs = stage_graphs(model.architecture)
    specs = {name: recipe.of_stage(name) for name in graphs}
    ranges: dict[str, dict[str, Range]] = {name: {} for name in graphs}
    quantizers: dict[str, Quantizer] = {}
    for index, batch in enumerate(batches):
        x: PyTree = Tensor(batch)
        fit = index == len(batches) - 1
        for done, (name, graph) in enumerate(graphs.items(), 1):
            x, ranges[name], fitted = _observe_stage(
                graph, fit, recipe.log_int_softmax, specs[name], model.weights[name], ranges[name], x
            )
            quantizers.update({f"{name}.{site}": quantizer for site, quantizer in fitted.items()})
            on_progress(index * len(graphs) + done, len(batches) * len(graphs))
    return {site: quantizers[site] for site in recipe.sites}
