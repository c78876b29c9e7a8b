"""ERQ (arXiv 2407.06794 and its TPAMI extension): reduces the error of quantized activations, then that of weights.

Both are reduced by ridge regression in closed form, that of weights also by refined rounding, each linear layer by
itself.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from pydantic import Field

from cptv_jax.calibration.error_feedback import quantize_by_halves, ridge
from cptv_jax.calibration.first_pass import find_reparameterizable, first_images, initialize, reparameterize
from cptv_jax.calibration.moments import Batch, Layer, Moments, append_bias, collect_moments, layers_of
from cptv_jax.calibration.percentile import fit_weight
from cptv_jax.options import options
from cptv_jax.quantized.model import Model, QuantizedModel
from cptv_jax.quantizers import DualUniform, OffsetUniform, Quantizer
from cptv_jax.recipe.spec import Recipe, SiteSpec

WEIGHT_PERCENTILES = (0.97, 0.98, 0.99, 0.995, 0.9995, 0.9997, 0.9999, 0.99995, 0.99999, 1.0)

_PUBLISHED_COE, _PUBLISHED_IMAGES, _PUBLISHED_TOKENS = 20_000.0, 1024, 197


@options
class ErqOptions:
    """ERQ: ridge regression against the errors of activations and weights, and refined rounding."""

    name: ClassVar[str] = "erq"
    images: int = Field(default=32, ge=1)
    """How many calibration images, the first ones, the quantizers of activations are fitted on; memory holds the
    tensors of one stage for all of them."""
    coe: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """The published code's coefficient of the ridge terms; null scales the published 20,000, which is for 1,024
    images, with the number of rows that a layer reads."""
    flips: int = Field(default=100, ge=0)
    """How many roundings of each output channel are reconsidered at most, in each half of the inputs."""
    round_zero_point: bool = False
    """Round the zero points that reparameterization makes, for integer deployment; the published code does not."""


def penalties(layer: Layer, rows: float, coe: float | None) -> tuple[float, float]:
    """Computes the ridge terms of a layer.

    The published terms are 0.1 coe, except 0.1 for the first of a layer that reads one row per image, and coe for the
    second of a convolution.

    Args:
        layer: The layer.
        rows: How many rows it reads.
        coe: The published code's coefficient; None scales the published one with the number of rows.

    Returns:
        The terms of the activations' and of the weights' error reduction.
    """
    published = _PUBLISHED_IMAGES * (1 if layer.per_image else _PUBLISHED_TOKENS)
    scale = rows / published if coe is None else 1.0
    coe = _PUBLISHED_COE if coe is None else coe
    first = 0.1 if layer.per_image else 0.1 * coe
    second = coe if layer.convolution else 0.1 * coe
    return first * scale, second * scale


def reduce_activation_error(
    parameters: Mapping[str, Array], moments: Moments, penalty: float
) -> dict[str, Float[Array, "..."]]:
    """Corrects a layer for the error of its quantized input (ERQ, "Activation Quantization Error Reduction").

    Args:
        parameters: The layer's kernel, and perhaps its bias.
        moments: The layer's moments.
        penalty: The ridge term.

    Returns:
        The kernel and bias whose outputs on quantized inputs come closest to the float outputs.
    """
    kernel = append_bias(parameters)
    size = len(kernel)
    gram, cross = np.asarray(moments.gram)[:size, :size], np.asarray(moments.cross)[:size]
    corrected = jnp.asarray(np.asarray(kernel) + ridge(gram, cross, penalty), jnp.float32)
    inputs = len(parameters["kernel"])
    return {"kernel": corrected[:inputs], **({"bias": corrected[inputs]} if size > inputs else {})}


def reduce_weight_error(
    layer: Layer, parameters: Mapping[str, Array], quantizer: Quantizer, moments: Moments, penalty: float, flips: int
) -> dict[str, Float[Array, "..."]]:
    """Quantizes a layer's weight by halves, see `quantize_by_halves`.

    The published code refines no roundings of a convolution.

    Args:
        layer: The layer.
        parameters: The layer's kernel, and perhaps its bias.
        quantizer: The weight's quantizer.
        moments: The layer's moments.
        penalty: The ridge term.
        flips: How many roundings of each output channel are reconsidered at most, in each half.

    Returns:
        The kernel on the quantizer's grid, and the bias.
    """
    assert isinstance(quantizer, OffsetUniform | DualUniform)
    kernel, bias = quantize_by_halves(
        parameters["kernel"],
        parameters.get("bias"),
        quantizer,
        np.asarray(moments.gram, np.float64),
        penalty,
        0 if layer.convolution else flips,
        # The order (channel, row, column) of a convolution's weights; for other layers, that of the inputs.
        np.arange(layer.inputs).reshape(-1, layer.channels).T.ravel(),
    )
    return {"kernel": kernel} if bias is None else {"kernel": kernel, "bias": bias}


@dataclass(frozen=True)
class Rewritten:
    """A linear layer after both reductions.

    Attributes:
        corrected: Its parameters after the first reduction, still in float.
        quantizer: Its weight's quantizer.
        parameters: Its parameters after both, with the weight on the quantizer's grid.
    """

    corrected: Mapping[str, Array]
    quantizer: Quantizer
    parameters: Mapping[str, Array]


def rewrite(
    layer: Layer, parameters: Mapping[str, Array], spec: SiteSpec, moments: Moments, options: ErqOptions, correct: bool
) -> Rewritten:
    """Carries out both reductions for one layer.

    Args:
        layer: The layer.
        parameters: The layer's kernel, and perhaps its bias.
        spec: The specification of its weight.
        moments: The layer's moments.
        options: The method's options.
        correct: Whether its input is quantized, so that there is an error to correct.

    Returns:
        The rewritten layer.
    """
    first, second = penalties(layer, float(moments.gram[-1, -1]), options.coe)
    if correct:
        parameters = reduce_activation_error(parameters, moments, first)
    quantizer = fit_weight(spec, parameters["kernel"], WEIGHT_PERCENTILES)
    final = reduce_weight_error(layer, parameters, quantizer, moments, second, options.flips)
    return Rewritten(parameters, quantizer, final)


def quantize(
    model: Model,
    batches: Sequence[Batch],
    recipe: Recipe,
    key: Array,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
    options: ErqOptions = ErqOptions(),  # noqa: B008
) -> QuantizedModel:
    """Quantizes everything that linear layers and matmuls read.

    All linear layers, and the LayerNorms before them, are rewritten.

    Args:
        model: The float model.
        batches: Normalised calibration images.
        recipe: What is quantized, and how.
        key: Unused; nothing here is random.
        on_progress: Called as on_progress(done, total), which count stages run and layers rewritten.
        options: The options.

    Returns:
        The quantized model.
    """
    del key
    layers = layers_of(model, recipe)
    total = len(model.architecture.stage_names) * (1 + len(batches)) + len(layers)
    done: Iterator[int] = iter(range(1, total + 1))

    def advance() -> None:
        on_progress(next(done), total)

    pairs = find_reparameterizable(model, recipe)
    quantizers = initialize(model, first_images(batches, options.images), recipe, pairs, False, advance)
    model, changed = reparameterize(model, quantizers, pairs, options.round_zero_point)
    quantizers |= changed
    moments = collect_moments(model, batches, layers, quantizers, advance)
    parameters = {}
    for layer in layers:
        spec, correct = recipe.sites[layer.site.name], layer.reads in quantizers
        found = rewrite(layer, model.layer(layer.name), spec, moments.pop(layer.name), options, correct)
        quantizers[layer.site.name], parameters[layer.name] = found.quantizer, found.parameters
        advance()
    return QuantizedModel(model.with_layers(parameters), recipe, {site: quantizers[site] for site in recipe.sites})
