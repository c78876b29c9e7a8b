"""The first steps that RepQ-ViT and ERQ share: quantizers fitted on the fly, and LayerNorms made layer-wise."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from cptv_jax.calibration import percentile
from cptv_jax.interpreters import Initializing, Tensor
from cptv_jax.models.architecture import site_table, sites_of
from cptv_jax.models.walk import Run, walk
from cptv_jax.quantized.model import Model
from cptv_jax.quantizers import FractionalUniform, OffsetUniform, Quantizer
from cptv_jax.recipe.sites import full_name, layer_norm_readers
from cptv_jax.recipe.spec import Recipe, SiteSpec

Batch = Float[Array, "_batch height width channels"]  # batches of one call may differ in size


def first_images(batches: Sequence[Batch], count: int) -> Float[Array, "count height width channels"]:
    """Concatenates the first images of a sequence of batches.

    Args:
        batches: The images in batches.
        count: How many images to take.

    Returns:
        The first `count` images, or all of them where there are fewer.
    """
    taken, missing = [], count
    for batch in batches:
        taken.append(batch[:missing])
        missing -= len(taken[-1])
        if missing == 0:
            break
    return jnp.concatenate(taken)


def find_reparameterizable(model: Model, recipe: Recipe) -> dict[str, tuple[str, ...]]:
    """Finds the LayerNorms that can be reparameterized.

    These are the LayerNorms before the last stage (both published codes leave the head's alone) that the recipe
    quantizes per tensor and whose readers have a bias to take up the shift.

    Args:
        model: The float model.
        recipe: What is quantized, and how.

    Returns:
        The linear layers that read each LayerNorm, by the LayerNorm's name.
    """
    found = {}
    table = site_table(model.architecture)
    for norm, weights in layer_norm_readers(sites_of(model.architecture)).items():
        layers = tuple(table[weight].layer_name for weight in weights)
        spec = recipe.sites.get(norm)
        if spec is not None and not spec.per_channel and all("bias" in model.layer(layer) for layer in layers):
            found[norm] = layers
    return found


@dataclass(frozen=True)
class _Initialize:
    """Visits a stage with the interpreter Initializing.

    Attributes:
        specs: The specifications of the stage's sites, by the site's local name.
    """

    specs: tuple[tuple[str, SiteSpec], ...]

    def __call__(self, run: Run, x: PyTree, arrays: PyTree) -> tuple[PyTree, PyTree]:
        ops = Initializing(dict(self.specs), percentile.fit)
        return run(ops, x), ops.fitted


def initialize(
    model: Model,
    images: Batch,
    recipe: Recipe,
    channel_wise: Mapping[str, Any],
    weights: bool,
    on_stage: Callable[[], None] = lambda: None,
    inputs: Mapping[str, PyTree] = MappingProxyType({}),
) -> dict[str, Quantizer]:
    """Fits quantizers in one quantizing forward pass: each on what its quantized predecessors give it.

    One stage is in memory at a time.

    Args:
        model: The float model.
        images: Normalised calibration images.
        recipe: What is quantized, and how.
        channel_wise: Sites that get a scale for each channel whatever the recipe says.
        weights: Whether weights are quantized too, or stay in float.
        on_stage: Called after every stage.
        inputs: What to feed a stage instead of the output of the stage before it, by stage (for comparisons with
            recordings).

    Returns:
        The quantizers by site.
    """
    specs: dict[str, list[tuple[str, SiteSpec]]] = {stage: [] for stage in model.architecture.stage_names}
    for name, spec in recipe.sites.items():
        site = recipe.places[name]
        if weights or site.role != "weight":
            spec = dataclasses.replace(spec, per_channel=spec.per_channel or name in channel_wise)
            specs[site.stage].append((site.local, spec))
    visits = {stage: _Initialize(tuple(found)) for stage, found in specs.items()}
    quantizers: dict[str, Quantizer] = {}
    for stage, _, fitted in walk(model.architecture, model.weights, Tensor(images), visits, inputs=inputs):
        quantizers.update({full_name(stage, site): quantizer for site, quantizer in fitted.items()})
        on_stage()
    return quantizers


def reparameterize(
    model: Model,
    quantizers: Mapping[str, Quantizer],
    pairs: Mapping[str, Sequence[str]],
    round_zero_point: bool = False,
) -> tuple[Model, dict[str, Quantizer]]:
    """Turns channel-wise quantizers after LayerNorms into layer-wise ones.

    RepQ-ViT, "Scale Reparam for LayerNorm Activations": the LayerNorm's affine parameters scale and shift each channel
    to the common grid, and the layers that read it undo that. In float the new model computes the same as the old one.

    Args:
        model: The float model.
        quantizers: The quantizers by site; those of the LayerNorms are channel-wise.
        pairs: The layers that read each LayerNorm, by the LayerNorm's name.
        round_zero_point: Whether to round the mean of the zero points, for integer deployment; the published code
            leaves it fractional.

    Returns:
        The rewritten model, and the LayerNorms' new quantizers by site.
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
