"""Quantizers by percentile search, the initialization that RepQ-ViT and ERQ share."""

import math
from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from cptv_jax.quantizers import DualUniform, LogSqrt2, OffsetUniform, Quantizer, true_divide
from cptv_jax.recipe.spec import SiteSpec

# Both published codes try these on activations, RepQ-ViT on weights too.
PERCENTILES = (0.999, 0.9999, 0.99999)

_SMALLEST_SCALE = float(jnp.finfo(jnp.float32).eps)
_LARGEST_TORCH_QUANTILE = 16_000_000  # the limit of torch.quantile, beyond which the published code falls back to NumPy


def _rank(quantile: float, count: int) -> float:
    """Returns where a quantile lies among `count` sorted values; in float32, as torch computes it."""
    if count > _LARGEST_TORCH_QUANTILE:
        return quantile * (count - 1)
    return float(np.float32(quantile) * np.float32(count - 1))


def _order_statistics(x: Float[Array, "rows count"], places: list[int]) -> Float[Array, "places rows"]:
    """Returns the values at these places of each row once it is sorted."""

    def on_host(x: Array) -> Array:  # XLA's CPU sort takes ten times as long as everything else in a calibration
        result = jax.ShapeDtypeStruct((len(places), x.shape[0]), x.dtype)
        return jax.pure_callback(lambda x: np.partition(np.asarray(x), places, -1)[:, places].T, result, x)

    return jax.lax.platform_dependent(x, cpu=on_host, default=lambda x: jnp.sort(x, -1)[:, jnp.asarray(places)].T)


def quantiles(x: Float[Array, "rows count"], shares: Sequence[float]) -> Float[Array, "quantiles rows"]:
    """Computes quantiles of each row, linearly interpolated as torch.quantile does.

    Args:
        x: The rows.
        shares: The quantiles to compute, from 0 to 1.

    Returns:
        The quantiles.
    """
    ranks = [_rank(share, x.shape[-1]) for share in shares]
    ends = _order_statistics(x, [math.floor(rank) for rank in ranks] + [math.ceil(rank) for rank in ranks])
    low, high = ends[: len(ranks)], ends[len(ranks) :]
    weight = np.array([[rank - math.floor(rank)] for rank in ranks])
    from_low, from_high = weight.astype(np.float32), (1.0 - weight).astype(np.float32)
    # torch's lerp starts from the nearer end.
    return jnp.where(weight < 0.5, low + from_low * (high - low), high - from_high * (high - low))


def _mean_squares(errors: Float[Array, "rows count"]) -> Float[Array, " rows"]:
    """Returns the mean of squares along each row.

    It is summed in two steps: one long float32 sum would lose the digits that decide near ties.
    """
    rows, count = errors.shape
    side = max(1, int(count**0.5))
    padded = jnp.pad(errors**2, ((0, 0), (0, -count % side)))
    return jnp.sum(jnp.sum(padded.reshape(rows, -1, side), -1), -1) / count


def _pick_least(scores: Float[Array, "candidates rows"], candidates: Float[Array, "candidates rows"]) -> Array:
    """Returns the candidate with the least score for each row."""
    return jnp.take_along_axis(candidates, jnp.argmin(scores, 0)[None], 0)[0]


def _search_uniform(
    x: Float[Array, "rows count"], bits: int, percentiles: Sequence[float]
) -> tuple[Float[Array, " rows"], Float[Array, " rows"]]:
    """Searches the clipping range with the least squared error for each row.

    The rule for degenerate rows: a range without extent is no candidate. Where none is left the whole range is taken,
    and a constant row's range is widened to include zero, so that its scale is |v| / (2^bits - 1) and its value is
    represented exactly. A row of zeros gets the smallest scale that is used, 2^-23.

    Returns:
        Scale and zero point of each row.
    """
    levels = 2.0**bits - 1
    ends = quantiles(x, [*percentiles, *(1.0 - percentile for percentile in percentiles)])
    upper, lower = ends[: len(percentiles)], ends[len(percentiles) :]
    scales = true_divide(upper - lower, levels)
    zero_points = jnp.round(true_divide(-lower, scales))

    def score(scale: Array, zero_point: Array) -> Array:
        grid = OffsetUniform(scale[:, None], zero_point[:, None], jnp.float32(0), jnp.float32(levels))
        return jnp.where(scale > 0, _mean_squares(grid.values(grid.codes(x)) - x), jnp.inf)

    scores = jax.lax.map(
        lambda candidate: score(*candidate), (scales, zero_points)
    )  # unrolled, it takes longer to compile
    scale, zero_point = _pick_least(scores, scales), _pick_least(scores, zero_points)

    smallest, largest = jnp.min(x, -1), jnp.max(x, -1)
    constant = smallest == largest
    smallest = jnp.where(constant, jnp.minimum(smallest, 0), smallest)
    largest = jnp.where(constant, jnp.maximum(largest, 0), largest)
    whole = jnp.maximum(true_divide(largest - smallest, levels), _SMALLEST_SCALE)
    degenerate = jnp.all(scales <= 0, 0)
    return (
        jnp.where(degenerate, whole, scale),
        jnp.where(degenerate, jnp.round(true_divide(-smallest, whole)), zero_point),
    )


def _search_log_sqrt2(x: Float[Array, "..."], bits: int, percentiles: Sequence[float]) -> LogSqrt2:
    """Returns the quantizer whose largest value with a code of its own has the least squared error."""
    flat, high = x.reshape(1, -1), jnp.float32(2.0**bits - 1)

    def score(scale: Array) -> Array:
        quantizer = LogSqrt2(scale, high)
        return jnp.where(scale > 0, _mean_squares(quantizer.values(quantizer.codes(flat)) - flat)[0], jnp.inf)

    scales = quantiles(flat, percentiles)[:, 0]
    scores = jax.lax.map(score, scales)
    found = scales[jnp.argmin(scores)]
    return LogSqrt2(jnp.where(found > 0, found, jnp.maximum(jnp.max(flat), _SMALLEST_SCALE)), high)


def _search(x: Float[Array, "..."], spec: SiteSpec, percentiles: Sequence[float]) -> OffsetUniform:
    """Returns the uniform quantizer of a tensor, per channel or per tensor."""
    rows = x.reshape(-1, x.shape[-1]).T if spec.per_channel else x.reshape(1, -1)
    scale, zero_point = _search_uniform(rows, spec.bits, percentiles)
    if not spec.per_channel:
        scale, zero_point = scale[0], zero_point[0]
    return OffsetUniform(scale, zero_point, jnp.float32(0), jnp.float32(2.0**spec.bits - 1))


def fit(spec: SiteSpec, x: Float[Array, "..."], percentiles: Sequence[float] = PERCENTILES) -> Quantizer:
    """Fits the quantizer of a tensor by percentile search.

    Args:
        spec: The site's specification: quantizer (uniform or log-sqrt2), bits, granularity.
        x: The tensor, whose last axis is the channels.
        percentiles: The upper ends of the clipping ranges that are tried, as shares; the lower ends lie symmetrically.

    Returns:
        The quantizer.
    """
    if spec.quantizer == "log-sqrt2":
        return _search_log_sqrt2(x, spec.bits, percentiles)
    return _search(x, spec, percentiles)


@partial(jax.jit, static_argnames=("spec", "percentiles"))
def _fit_weight(spec: SiteSpec, kernel: Float[Array, "inputs outputs"], percentiles: tuple[float, ...]) -> Quantizer:
    return fit(spec, kernel, percentiles)


def outlier_inputs(kernel: Float[Array, "inputs outputs"]) -> Bool[np.ndarray, " inputs"]:
    """Finds the inputs with the most outliers, at most outputs // 20 of them (ERQ, dual uniform quantization).

    An outlier lies beyond the 99th percentile of its output channel's positive weights or the 1st percentile of its
    negative ones. Among inputs with equal counts, the input whose first outlier is in an earlier output channel comes
    first, then the earlier input.

    Args:
        kernel: The weight.

    Returns:
        Whether each input is one of them.
    """
    weight = np.asarray(kernel)
    inputs, outputs = weight.shape
    rank = np.argsort(np.argsort(weight, 0, kind="stable"), 0, kind="stable")
    negative, positive = np.sum(weight < 0, 0), np.sum(weight > 0, 0)
    # In whole numbers: a percentile falls on a value or between two, and only values beyond it count.
    above = (weight > 0) & (100 * (rank - (inputs - positive)) > 99 * (positive - 1))
    below = (weight < 0) & (100 * rank < negative - 1)
    outlier = above | below
    counts = outlier.sum(1)
    first = np.where(counts > 0, outlier.argmax(1), outputs)
    most = np.lexsort((np.arange(inputs), first, -counts))[: outputs // 20]
    chosen = np.zeros(inputs, bool)
    chosen[most] = True
    return chosen & (counts > 0)


def fit_weight(
    spec: SiteSpec, kernel: Float[Array, "inputs outputs"], percentiles: tuple[float, ...] = PERCENTILES
) -> Quantizer:
    """Fits the quantizer of a weight by percentile search.

    Args:
        spec: The weight's specification: quantizer (uniform or dual-uniform), bits, granularity.
        kernel: The weight.
        percentiles: See `fit`.

    Returns:
        The quantizer.
    """
    if spec.quantizer != "dual-uniform":
        return _fit_weight(spec, kernel, percentiles)
    is_outlier = outlier_inputs(kernel)
    if is_outlier.all():  # nothing would be left for the other grid
        is_outlier = np.zeros_like(is_outlier)
    ordinary = _fit_weight(spec, kernel[~is_outlier], percentiles)
    outlier = _fit_weight(spec, kernel[is_outlier], percentiles) if is_outlier.any() else ordinary
    assert isinstance(ordinary, OffsetUniform) and isinstance(outlier, OffsetUniform)
    return DualUniform(
        scale=ordinary.scale,
        zero_point=ordinary.zero_point,
        outlier_ratio=true_divide(outlier.scale, ordinary.scale),
        outlier_zero_point=outlier.zero_point,
        is_outlier=jnp.asarray(is_outlier),
        low=ordinary.low,
        high=ordinary.high,
    )
