"""PTQ4ViT (arXiv 2111.12293) and its baseline: a search on the output of its layer sets every interval.

All layers are calibrated on inputs of the float model, one at a time. The initial interval of a tensor or group is its
largest absolute value over 2^(bits-1) - 0.5; candidates are alpha to beta times that, and the best intervals of a
layer's two operands are found in turns (section 4.2).

The published Hessian metric weighs errors with the gradient of KL(p || p), the divergence of the float model from
itself, which is zero except for rounding noise. Here it is the gradient of the float model's cross-entropy against a
label sampled from its own output for every image; its square estimates the diagonal of the Fisher information without
bias.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from pydantic import Field

from cptv_jax.calibration.first_pass import first_images
from cptv_jax.calibration.interval_search import (
    LayerSearch,
    LossOptions,
    Metric,
    OperandSearch,
    scale_by_factors,
    stack,
)
from cptv_jax.calibration.layerwise import Layer, float_stage_inputs, layers, operations
from cptv_jax.errors import InputError
from cptv_jax.interpreters.arithmetic import Arithmetic
from cptv_jax.models.architecture import Architecture, sites_of
from cptv_jax.options import options
from cptv_jax.quantized.execution import arithmetic_for
from cptv_jax.quantized.model import Model, QuantizedModel
from cptv_jax.quantizers import Quantizer, TwinGelu, Uniform, grid, true_divide, twin_softmax
from cptv_jax.recipe.spec import Recipe, SiteSpec
from cptv_jax.runtime.forward import activation_bytes
from cptv_jax.runtime.mesh import rows_at_once
from cptv_jax.runtime.stages import Output

# The most negative value that the published code expects of GELU (its true minimum is -0.16997121).
_GELU_RANGE = 0.16997124254703522
_CHUNKS = 8
_AT_ONCE = 100  # the most candidates under vmap together
_SPLITS = 20  # candidates 2^0, 2^-1, ...
_SMALLEST_INTERVAL = float(jnp.finfo(jnp.float32).eps)


@options
class Ptq4VitOptions:
    """PTQ4ViT: every interval by a search on the output of its layer; null means the published choice for the preset.

    While it runs, the inputs of every stage and those of one layer, with their gradients, are held for all `images`.
    """

    name: ClassVar[str] = "ptq4vit"
    images: int = Field(default=32, ge=1)
    """How many calibration images, the first ones, layers are searched on."""
    metric: Metric | None = None
    """How far a layer's output is from the float one; null means hessian, or cosine for the preset base-ptq."""
    alpha: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """The smallest factor of the initial interval; null means 0.01, or 0.5 for the preset base-ptq."""
    beta: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """The largest factor of the initial interval, itself not tried; null means 1.2."""
    candidates: int = Field(default=100, ge=1)
    """How many factors from alpha to beta are tried."""
    rounds: int | None = Field(default=None, ge=1)
    """Turns over both operands of a layer; null means 3, or 1 for the preset base-ptq."""
    softmax_form: Literal["piecewise", "published"] = "piecewise"
    """The twin quantizer after softmax: piecewise, or with the offset of the published code, for parity with it."""
    images_at_once: int | None = Field(default=None, ge=1)
    """How many images a candidate is evaluated on at once; null lets the device decide."""
    candidates_at_once: int | None = Field(default=None, ge=1)
    """How many candidates are evaluated at once; null lets the device decide."""


@dataclass(frozen=True)
class Search:
    """The options with every null filled in.

    Attributes:
        loss: How losses are measured and computed.
        alpha: The smallest factor of the initial interval.
        beta: The largest factor of the initial interval, itself not tried.
        candidates: How many factors are tried.
        rounds: Turns over both operands of a layer.
        overlap: Whether the twin quantizer after softmax has the published code's form, see `TwinSoftmax`.
    """

    loss: LossOptions
    alpha: float
    beta: float
    candidates: int
    rounds: int
    overlap: bool

    @property
    def factors(self) -> Float[np.ndarray, " candidates"]:
        """The factors of the initial interval that are tried, float32."""
        span = self.beta - self.alpha
        return np.asarray([self.alpha + i * span / self.candidates for i in range(self.candidates)], np.float32)


_PUBLISHED = {
    "ptq4vit": Ptq4VitOptions(metric="hessian", alpha=0.01, beta=1.2, rounds=3),
    "base-ptq": Ptq4VitOptions(metric="cosine", alpha=0.5, beta=1.2, rounds=1),
}


def resolve(
    options: Ptq4VitOptions,
    preset: str,
    at_once: int = 1,
    arithmetic: Arithmetic = Arithmetic(),  # noqa: B008 - frozen
) -> Search:
    """Resolves the options against a preset.

    Args:
        options: The options.
        preset: The recipe's preset, whose published choices fill in nulls.
        at_once: How many candidates are evaluated together under vmap.
        arithmetic: How codes are multiplied.

    Returns:
        The options with every null filled in.

    Raises:
        InputError: alpha and beta leave no factor to try.
    """
    published = _PUBLISHED[preset]
    alpha = published.alpha if options.alpha is None else options.alpha
    beta = published.beta if options.beta is None else options.beta
    metric, rounds = options.metric or published.metric, options.rounds or published.rounds
    assert alpha is not None and beta is not None and metric is not None and rounds is not None
    if not 0 < alpha < beta:
        raise InputError(f"method.alpha is {alpha} and method.beta {beta}; give 0 < alpha < beta")
    overlap = options.softmax_form == "published"
    return Search(LossOptions(metric, at_once, arithmetic), alpha, beta, options.candidates, rounds, overlap)


def quantize(
    model: Model,
    batches: Sequence[Float[Array, "_batch height width channels"]],
    recipe: Recipe,
    key: Array,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
    *,
    options: Ptq4VitOptions = Ptq4VitOptions(),  # noqa: B008
    logit_gradient: Float[Array, "images classes"] | None = None,
) -> QuantizedModel:
    """Quantizes every site of the recipe; weights stay as they are.

    Args:
        model: The float model.
        batches: Normalised calibration images; how they are batched does not matter.
        recipe: What is quantized, and how.
        key: Random key of the sampled labels.
        on_progress: Called as on_progress(done, total), which count layers.
        options: The options.
        logit_gradient: Gradient with respect to the logits for the Hessian metric, for the images that are searched on,
            instead of the one at sampled labels.

    Returns:
        The quantized model.

    Raises:
        InputError: The recipe or the options are not for this method, see `check`.
    """
    check(model.architecture, recipe, options)
    images = first_images(batches, options.images)
    rows = rows_at_once(activation_bytes(model.stages(), jax.eval_shape(lambda: images[:1])))
    # Candidates are dropped between chunks of images, so there should be several.
    size = options.images_at_once or max(1, min(rows, len(images) // _CHUNKS))
    at_once = options.candidates_at_once or max(1, min(rows // size, _AT_ONCE))
    search = resolve(options, recipe.name, at_once, arithmetic_for(model.architecture, recipe))
    inputs, outputs = float_stage_inputs(model, _chunks(images, size))
    gradients = None
    if search.loss.metric == "hessian":
        if logit_gradient is None:
            gradients = _sample_gradients(outputs, key)
        else:
            gradients = split_logit_gradient(outputs, logit_gradient)
    quantizers: dict[str, Quantizer] = {}
    total = len(operations(model, recipe.sites))
    on_progress(0, total)
    for done, layer in enumerate(layers(model, inputs, gradients, recipe.sites), 1):
        found = layer_search(layer, recipe, search, quantizers).search(search.rounds)
        quantizers |= {site: each for site, each in zip(layer.sites, found, strict=True) if each is not None}
        on_progress(done, total)
    return QuantizedModel(model, recipe, {site: quantizers[site] for site in recipe.sites})


def layer_search(layer: Layer, recipe: Recipe, search: Search, fitted: Mapping[str, Quantizer]) -> LayerSearch:
    """Sets up the search for one layer: initial intervals and candidates of its operands.

    Args:
        layer: The layer and its samples.
        recipe: What is quantized, and how.
        search: The options with every null filled in.
        fitted: Quantizers found so far. A tensor that several layers read keeps the quantizer that the first one found.

    Returns:
        The search, ready to be run.
    """

    def operand(side: int) -> OperandSearch:
        spec = recipe.sites.get(layer.sites[side])
        if spec is None:
            return OperandSearch()
        if layer.sites[side] in fitted:
            return OperandSearch(fitted[layer.sites[side]])
        if spec.quantizer == "twin-softmax":
            splits = [twin_softmax(spec.bits, jnp.float32(2.0**-i), search.overlap) for i in range(_SPLITS)]
            # A split of one coarse step leaves no gap between the ranges.
            return OperandSearch(candidates=stack(splits), neutral=spec.bits - 1, alone=True)
        initial = _initial_quantizer(_operand_arrays(layer, side), spec)
        neutral = int(np.argmin(np.abs(search.factors - 1)))
        return OperandSearch(initial, scale_by_factors(initial, search.factors), neutral)

    return LayerSearch(layer, (operand(0), operand(1)), search.loss)


def _operand_arrays(layer: Layer, side: int) -> list[Array]:
    """Returns the arrays of one operand: the weight, or what each chunk's samples have."""
    if side == 1 and layer.operation.weight is not None:
        return [layer.operation.weight[0]]
    return [samples.operands[side] for samples in layer.samples]


def _initial_quantizer(arrays: Sequence[Array], spec: SiteSpec) -> Quantizer:
    """Returns the quantizer whose range ends half a step past the largest absolute value.

    The largest value is that of a tensor, channel, part or head. A group that is zero everywhere gets a tiny interval
    instead of none.
    """
    largest = jnp.max(jnp.stack([_largest(array, spec) for array in arrays]), 0)
    low, high = (jnp.float32(bound) for bound in grid(spec.bits, signed=True))
    scale = jnp.maximum(true_divide(largest, high + 0.5), _SMALLEST_INTERVAL)
    if spec.quantizer == "twin-gelu":
        return TwinGelu(scale, jnp.float32(_GELU_RANGE) / -low, low, high)
    return Uniform(scale, jnp.float32(0), low, high)


def _largest(values: Array, spec: SiteSpec) -> Array:
    """Returns the largest absolute value (post-GELU: the largest positive one), in the shape of the spec's scale."""
    if spec.quantizer == "twin-gelu":
        return jnp.maximum(jnp.max(values), 0.0)
    if spec.per_head:
        return jnp.max(jnp.abs(values), (0, 2, 3))[:, None, None]
    if spec.per_channel:
        return jnp.max(jnp.abs(values.reshape(-1, values.shape[-1])), 0)
    if spec.parts > 1:
        return jnp.max(jnp.abs(values.reshape(-1, spec.parts, values.shape[-1] // spec.parts)), (0, 2))
    return jnp.max(jnp.abs(values))


def _chunks(images: Array, size: int) -> list[Array]:
    """Returns images in chunks of one size, where a size near the wanted one divides their number."""
    count = len(images)
    pieces = -(-count // size)
    while count % pieces and pieces < 2 * -(-count // size):
        pieces += 1
    width = -(-count // pieces)
    return [images[i : i + width] for i in range(0, count, width)]


def _sample_gradients(outputs: Sequence[Output], key: Array) -> list[Output]:
    """Returns gradients of the cross-entropy against one label per image, drawn from the model's own output."""
    logits = jnp.concatenate([output.logits for output in outputs])
    labels = jax.random.categorical(key, logits)
    return split_logit_gradient(outputs, jax.nn.softmax(logits) - jax.nn.one_hot(labels, logits.shape[-1]))


def split_logit_gradient(outputs: Sequence[Output], logit_gradient: Float[Array, "images classes"]) -> list[Output]:
    """Splits a gradient with respect to the logits into the chunks of the outputs.

    Args:
        outputs: The model's output for every chunk of images.
        logit_gradient: The gradient for all images.

    Returns:
        The gradient with respect to the model's output, for every chunk.
    """
    ends = np.cumsum([len(output.logits) for output in outputs])
    parts = jnp.split(jnp.asarray(logit_gradient), ends[:-1])
    return [Output(jnp.zeros_like(output.features), part) for output, part in zip(outputs, parts, strict=True)]


def check(architecture: Architecture, recipe: Recipe, options: Ptq4VitOptions) -> None:
    """Checks that this method can carry out a recipe, apart from its `Abilities`.

    Args:
        architecture: The model's architecture.
        recipe: What is asked for.
        options: The options.

    Raises:
        InputError: The options leave no factor to try, or this method cannot quantize a site as the recipe says.
    """
    resolve(options, recipe.name)
    sites = sites_of(architecture)
    read = {name: site.kind for site in sites for name in site.reads}
    for name, spec in recipe.sites.items():
        weight = recipe.places[name].role == "weight"
        if not weight and name not in read:
            raise InputError(f"{name}: no linear layer or matmul reads it, so ptq4vit cannot set it; leave it in float")
        if spec.bias_correction or (spec.quantizer == "uniform" and not (spec.signed and spec.symmetric)):
            raise InputError(
                f"{name}: ptq4vit's grids are signed and symmetric, without bias correction; "
                "set signed: true, symmetric: true, bias_correction: false"
            )
        one = spec.quantizer == "uniform" and read.get(name) == "matmul"
        if (not weight and (spec.per_channel or spec.parts > 1)) or (spec.per_head and not one):
            raise InputError(
                f"{name}: ptq4vit has one interval for an activation, or one a head for a matmul's uniform operand; "
                "set per_channel: false, parts: 1 and per_head: false"
            )
