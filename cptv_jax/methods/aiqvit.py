"""AIQViT (arXiv 2502.04628): low-rank compensation of quantized weights, and a quantizer that focuses on an interval.

There is no public code. Where the paper leaves something open, it is chosen here, and measured against other choices in
docs/results.md, "AIQViT's constants":

* Quantizers start as RepQ-ViT's: percentile search and reparameterized LayerNorms, with integral zero points.
* A compensating term starts as the best one of its rank for the weight's rounding error (its truncated singular value
  decomposition), and may have one of `ranks` columns.
* Ranks are chosen by a short block reconstruction in which every layer mixes all its candidates by a softmax of learned
  preferences, on one level: terms and preferences, and nothing else, learn from the same images. `penalty` makes a
  term's size a part of the loss, as more columns never fit worse. The preferred candidate stays, with the values that
  it has learned.
* Every head's attention map has an interval of its own. It starts as the interval, from a grid, with the least squared
  error of the map's product with the values.
* Block reconstruction follows, easy images first: reconstruction/blocks.py, with the defaults that methods/registry.py
  gives this method.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree
from pydantic import Field

from cptv_jax.calibration.first_pass import first_images
from cptv_jax.calibration.percentile import quantiles
from cptv_jax.interpreters import Capturing, Tensor
from cptv_jax.methods import repq_vit
from cptv_jax.models.architecture import sites_of
from cptv_jax.models.walk import Run, walk
from cptv_jax.options import Numbers, options
from cptv_jax.quantized.model import Model, QuantizedModel
from cptv_jax.quantizers import Focusing, LowRank, Quantizer, RankSearch, Uniform
from cptv_jax.recipe.spec import Recipe
from cptv_jax.reconstruction.blocks import reconstruct
from cptv_jax.reconstruction.config import ReconstructionConfig

_ENDS = tuple(2.0 ** (-k / 2) for k in range(13))  # fractions of the largest value, tried as an interval's upper end
_STARTS = (0.0, 0.1, 0.2, 0.3, 0.5)  # quantiles, tried as its lower end


@options
class AiqvitOptions:
    """AIQViT: low-rank terms added to quantized weights, and a quantizer that focuses on an interval of attention."""

    name: ClassVar[str] = "aiqvit"
    images: int = Field(default=32, ge=1)
    """How many calibration images, the first ones, quantizers are fitted on; memory holds the tensors of one stage for
    all of them."""
    search_images: int = Field(default=128, ge=1)
    """How many calibration images ranks are chosen on."""
    search_steps: int = Field(default=30, ge=0)
    """Optimizer steps per stage for choosing ranks; 0 gives every layer the largest."""
    ranks: Numbers = (2, 4, 8, 16)
    """The ranks to choose from."""
    penalty: float = Field(default=0.001, ge=0, allow_inf_nan=False)
    """Loss, relative to a stage's output, of a term as large as its weight."""


def fit_focusing(
    attention: Float[Array, "images heads queries keys"],
    values: Float[Array, "images heads keys channels"],
    bits: int,
    per_head: bool,
) -> Focusing:
    """Fits the interval, among those tried, with the least squared error of attention @ values.

    The error of the map itself would be the wrong measure: its few large entries decide that, while the many small ones
    sum up to as much of the product (DeiT-Tiny, 4 bits: 2 to 13 times the error of intervals fitted this way).

    Args:
        attention: Attention maps of the float model.
        values: The values that the maps are multiplied with.
        bits: Width of the codes.
        per_head: Whether each head has an interval of its own, or all share one.

    Returns:
        The quantizer.
    """
    rows = attention.swapaxes(0, 1)
    flat = rows.reshape(rows.shape[0], -1) if per_head else attention.reshape(1, -1)
    starts, largest = quantiles(flat, _STARTS), jnp.max(flat, -1)
    high = jnp.float32(2**bits - 1)

    def interval(index: Array) -> Focusing:
        """Returns the quantizer in which each head has the interval with its index, [heads]."""
        start = jnp.take_along_axis(starts, (index // len(_ENDS))[None], 0)[0]
        end = largest * jnp.asarray(_ENDS)[index % len(_ENDS)]
        scale = jnp.maximum((end - start) / high, jnp.finfo(jnp.float32).eps)
        shape = (-1, 1, 1) if per_head else ()
        return Focusing(scale.reshape(shape), start.reshape(shape), high)

    def error(index: Array) -> Array:
        focusing = interval(jnp.broadcast_to(index, largest.shape))
        error = focusing.values(focusing.codes(attention)) - attention
        product = jnp.matmul(error, values, precision=jax.lax.Precision.HIGHEST)
        by_head = jnp.sum(product**2, (0, 2, 3))
        return by_head if per_head else jnp.sum(by_head, keepdims=True)

    return interval(jnp.argmin(jax.lax.map(error, jnp.arange(len(_STARTS) * len(_ENDS))), 0))


_fit_focusing = jax.jit(fit_focusing, static_argnums=(2, 3))


def fit_low_rank(quantizer: Uniform, kernel: Float[Array, "inputs outputs"], rank: int) -> LowRank:
    """Fits the low-rank term that leaves the least of the weight's rounding error.

    Args:
        quantizer: The weight's quantizer.
        kernel: The float weight.
        rank: The rank of the term, which is limited by the weight's.

    Returns:
        The quantizer with the term.
    """
    error = np.asarray(kernel - quantizer.values(quantizer.codes(kernel)), np.float64)
    left, strengths, right = np.linalg.svd(error, full_matrices=False)
    roots = np.sqrt(strengths[:rank])
    down, up = left[:, :rank] * roots, roots[:, None] * right[:rank]
    return LowRank(quantizer, jnp.asarray(down, jnp.float32), jnp.asarray(up, jnp.float32))


@dataclass(frozen=True)
class _Capture:
    """Visits a stage and finds the inputs of some of its matmuls, named relative to the stage."""

    matmuls: tuple[str, ...]

    def __call__(self, run: Run, x: PyTree, arrays: PyTree) -> tuple[PyTree, PyTree]:
        ops = Capturing({}, self.matmuls)
        return run(ops, x), ops.inputs


def _fit_attention(model: Model, images: Array, recipe: Recipe) -> dict[str, Quantizer]:
    """Returns focusing quantizers for the sites that ask for one, from the float model's matmuls that read them."""
    readers = {site.reads[0]: site for site in sites_of(model.architecture) if site.kind == "matmul"}
    by_stage: dict[str, dict[str, str]] = {stage: {} for stage in model.architecture.stage_names}
    for name in sorted(recipe.sites):
        if recipe.sites[name].quantizer == "focusing":
            by_stage[readers[name].stage][name] = readers[name].layer
    visits = {stage: _Capture(tuple(matmuls.values())) for stage, matmuls in by_stage.items()}
    found: dict[str, Quantizer] = {}
    for stage, _, inputs in walk(model.architecture, model.weights, Tensor(images), visits):
        for name, reader in by_stage[stage].items():
            spec = recipe.sites[name]
            found[name] = _fit_focusing(*inputs[reader], spec.bits, spec.per_head)
    return found


def _start(
    model: Model, images: Array, recipe: Recipe, key: Array, on_progress: Callable[[int, int], None]
) -> QuantizedModel:
    """Returns RepQ-ViT's model, with focusing quantizers where the recipe asks for them."""
    sites = {
        name: replace(spec, quantizer="log-sqrt2", per_head=False)
        if spec.quantizer == "focusing"
        else replace(spec, low_rank=False)
        for name, spec in recipe.sites.items()
    }
    options = repq_vit.RepqVitOptions(images=images.shape[0], round_zero_point=True)
    start = repq_vit.quantize(model, [images], replace(recipe, sites=sites), key, on_progress, options)
    focusings = _fit_attention(model, images, recipe)
    return replace(start, recipe=recipe, quantizers={**start.quantizers, **focusings})


def _compensate(model: QuantizedModel, options: AiqvitOptions) -> QuantizedModel:
    """Returns the model with a term for each weight to which the recipe gives one.

    It has the largest rank, or a search among the ranks where the options ask for one.
    """
    found: dict[str, Quantizer] = {}
    ranks = jnp.asarray(sorted(options.ranks), jnp.float32)
    for site, spec in model.recipe.sites.items():
        if not spec.low_rank:
            continue
        quantizer = model.quantizers[site]
        assert isinstance(quantizer, Uniform)
        term = fit_low_rank(
            quantizer, model.model.layer(model.recipe.places[site].layer_name)["kernel"], max(options.ranks)
        )
        found[site] = term
        if options.search_steps:
            even = jnp.zeros(len(ranks))
            found[site] = RankSearch(quantizer, term.down, term.up, ranks, even, jnp.float32(options.penalty))
    return replace(model, quantizers={**model.quantizers, **found})


def _decide(quantizers: Mapping[str, Quantizer]) -> dict[str, Quantizer]:
    """Returns the quantizers with the preferred rank in place of each search."""
    return {site: q.choose() if isinstance(q, RankSearch) else q for site, q in quantizers.items()}


def quantize(
    model: Model,
    batches: Sequence[Float[Array, "_batch height width channels"]],
    recipe: Recipe,
    key: Array,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
    options: AiqvitOptions = AiqvitOptions(),  # noqa: B008
) -> QuantizedModel:
    """Makes a model with compensated weights and focusing attention quantizers, ready for block reconstruction.

    Args:
        model: The float model.
        batches: Normalised calibration images.
        recipe: What is quantized, and how.
        key: Random key of the search for ranks.
        on_progress: Called as on_progress(done, total), which count stages and then the steps of the search for ranks.
        options: The options.

    Returns:
        The quantized model.
    """
    stages = len(model.stages())
    steps = stages * options.search_steps * any(spec.low_rank for spec in recipe.sites.values())

    def on_stage(done: int, total: int) -> None:
        on_progress(done, stages + steps)

    def on_step(done: int, total: int) -> None:
        on_progress(stages + done, stages + steps)

    started = _start(model, first_images(batches, options.images), recipe, key, on_stage)
    compensated = _compensate(started, options)
    if steps:
        images = np.asarray(first_images(batches, options.search_images))
        config = ReconstructionConfig(
            steps=options.search_steps, scale_rate=0, zero_point_rate=0, rounding_rate=0, weight_rate=0, easy_first=1.0
        )
        compensated = reconstruct(model, compensated, images, config, key, on_step)
    return replace(compensated, quantizers=_decide(compensated.quantizers))
