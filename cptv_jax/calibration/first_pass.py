"""The first steps that RepQ-ViT and ERQ share: quantizers fitted on the fly, and LayerNorms made layer-wise."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, PyTree

from cptv_jax.calibration import percentile
from cptv_jax.interpreters import Initializing, Tensor
from cptv_jax.models.architecture import call_stage, sites_of, stage_graphs
from cptv_jax.quantized.model import Model
from cptv_jax.quantizers import FractionalUniform, OffsetUniform, Quantizer
from cptv_jax.recipe.sites import layer_norm_readers
from cptv_jax.recipe.spec import Recipe, SiteSpec

Specs = tuple[tuple[str, SiteSpec], ...]
Batch = Float[Array, "batch height width channels"]


def first_images(batches: Sequence[Batch], count: int) -> Float[Array, "count height width channels"]:
    """The first `count` images of all batches (all of them where there are fewer)."""
    taken, missing = [], count
    for batch in batches:
        taken.append(batch[:missing])
        missing -= len(taken[-1])
        if missing == 0:
            break
    return jnp.concatenate(taken)


def reparameterized(model: Model, recipe: Recipe) -> dict[str, tuple[str, ...]]:
    """By LayerNorm to be reparameterized, the layers that read it.

    Those inside the blocks (both codes leave the head's alone) that the recipe quantizes per tensor and whose readers
    have a bias to take up the shift.
    """
    found = {}
    for norm, weights in layer_norm_readers(sites_of(model.architecture)).items():
        layers = tuple(weight.removesuffix(".weight") for weight in weights)
        spec = recipe.sites.get(norm)
        if spec is not None and not spec.per_channel and all("bias" in model.layer(layer) for layer in layers):
            found[norm] = layers
    return found


def _initialize(graph: nnx.GraphDef[Any], specs: Specs, weights: PyTree, x: PyTree) -> tuple[PyTree, Any]:
    ops = Initializing(dict(specs), percentile.fit)
    output = call_stage(graph, ops, weights, x)
    return output, ops.fitted


_initialize_stage = jax.jit(_initialize, static_argnums=(0, 1))


def initialize(
    model: Model,
    images: Batch,
    recipe: Recipe,
    channel_wise: Mapping[str, Any],
    weights: bool,
    on_stage: Callable[[], None] = lambda: None,
    inputs: Mapping[str, PyTree] = MappingProxyType({}),
) -> dict[str, Quantizer]:
    """Quantizers fitted in one quantizing forward pass: each on what its quantized predecessors give it.

    channel_wise: sites that get a scale for each channel whatever the recipe says. weights: whether weights are
    quantized too, or float. on_stage is called after every stage. One stage is in memory at a time.
    inputs: by stage, what to feed it instead of the output of the stage before (for comparisons with recordings).
    """
    x: PyTree = Tensor(images)
    quantizers: dict[str, Quantizer] = {}
    for stage, graph in stage_graphs(model.architecture).items():
        specs = {
            site: dataclasses.replace(spec, per_channel=spec.per_channel or f"{stage}.{site}" in channel_wise)
            for site, spec in recipe.of_stage(stage).items()
            if weights or not site.endswith(".weight")
        }
        x, fitted = _initialize_stage(graph, tuple(specs.items()), model.weights[stage], inputs.get(stage, x))
        quantizers.update({f"{stage}.{site}": quantizer for site, quantizer in fitted.items()})
        on_stage()
    return quantizers


def reparameterize(
    model: Model,
    quantizers: Mapping[str, Quantizer],
    pairs: Mapping[str, Sequence[str]],
    round_zero_point: bool = False,
) -> tuple[Model, dict[str, Quantizer]]:
    """Channel-wise quantizers behind LayerNorms become layer-wise ones (RepQ-ViT, "Scale Reparam for LayerNorm
    Activations"): the LayerNorm's affine scales and shifts each channel to the common grid, and the layers that
    read it undo that.

    pairs: by LayerNorm, the layers that read it. round_zero_point: round the mean of the zero points, for integer
    deployment; the published code leaves it fractional.
    Returns the rewritten model and the LayerNorms' new quantizers. In float the new model computes what the old did.
    """
    layers: dict[str, dict[str, Array]] = {}
    changed: dict[str, Quantizer] = {}
    for norm, readers in pairs.items():
        old = quantizers[norm]
        assert isinstance(old, OffsetUniform)
        scale, zero_point = jnp.mean(old.scale), jnp.mean(old.zero_point)
        if round_zero_point:
            zero_point = jnp.round(zero_point)
        new = OffsetUniform(scale, zero_point, old.low, old.high)
        changed[norm] = new if round_zero_point else FractionalUniform(new)
        factor = old.scale / scale
        shift = -old.zero_point * old.scale / factor + zero_point * scale
        affine = model.layer(norm)
        layers[norm] = {"weight": affine["weight"] / factor, "bias": affine["bias"] / factor - shift}
        for reader in readers:
            layer = model.layer(reader)
            kernel = layer["kernel"] * factor[:, None]
            moved = jnp.matmul(shift, kernel, precision=jax.lax.Precision.HIGHEST)
            layers[reader] = {"kernel": kernel, "bias": layer["bias"] + moved}
    return model.with_layers(layers), changed
