"""Calibration statistics, and the quantizer parameters that follow from them."""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from cptv_jax.quantizers import LARGEST_EXPONENT, BiasCorrected, Log2, Quantizer, Uniform, grid, true_divide
from cptv_jax.recipe.spec import SiteSpec

_SMALLEST_SCALE = float(jnp.finfo(jnp.float32).eps)
_EMA_MOMENTUM = 0.01  # weight of the newest batch, for EMA and percentile
_PERCENTILE = 0.99999
_OMSE_CANDIDATES = 90
_OMSE_STEP = 0.01


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Range:
    """Running minimum and maximum of a site: () per tensor, (channels,) per channel."""

    minimum: Float[Array, "..."]
    maximum: Float[Array, "..."]


def _extremes(x: Float[Array, "..."], spec: SiteSpec) -> Range:
    axes = tuple(range(x.ndim - 1)) if spec.per_channel else None
    return Range(jnp.min(x, axes), jnp.max(x, axes))


def _quantiles(x: Float[Array, "..."], spec: SiteSpec) -> Range:
    flat = x.reshape(-1)
    return Range(jnp.quantile(flat, 1.0 - _PERCENTILE), jnp.quantile(flat, _PERCENTILE))


def _widest(old: Range, new: Range) -> Range:
    return Range(jnp.minimum(old.minimum, new.minimum), jnp.maximum(old.maximum, new.maximum))


def _moving(old: Range, new: Range) -> Range:
    return jax.tree.map(lambda a, b: a + _EMA_MOMENTUM * (b - a), old, new)


def uniform_from_range(found: Range, spec: SiteSpec) -> Uniform:
    """Scale and zero point that spread the integer grid over a range (FQ-ViT, equations 2 and 3)."""
    low, high = (jnp.float32(bound) for bound in grid(spec.bits, spec.signed))
    if spec.symmetric:
        largest = jnp.maximum(-found.minimum, found.maximum)
        scale = jnp.maximum(true_divide(largest, (high - low) / 2), _SMALLEST_SCALE)
        return Uniform(scale, jnp.zeros_like(scale), low, high)
    scale = jnp.maximum(true_divide(found.maximum - found.minimum, high - low), _SMALLEST_SCALE)
    zero_point = jnp.clip(low - jnp.round(true_divide(found.minimum, scale)), low, high)
    return Uniform(scale, zero_point, low, high)


def _from_range(found: Range, x: Array, spec: SiteSpec) -> Uniform:
    return uniform_from_range(found, spec)


def _squared_errors(x: Float[Array, "... channels"], quantizer: Uniform) -> Float[Array, "rows channels"]:
    return ((quantizer.values(quantizer.codes(x)) - x) ** 2).reshape(-1, x.shape[-1])


def _mean(x: Float[Array, "rows columns"], axis: int) -> Float[Array, "..."]:
    # As a product with ones: XLA's CPU backend then vectorizes what is reduced, three times as fast as a reduction.
    ones = jnp.ones(x.shape[axis], x.dtype)
    return jnp.tensordot(x, ones, (axis, 0), precision=jax.lax.Precision.HIGHEST) / x.shape[axis]


def _omse(found: Range, x: Array, spec: SiteSpec) -> Uniform:
    """The range shrunk by the factor, of 90, with the least squared error on x (OMSE; one factor for all channels)."""

    def shrunk(index: Array) -> Range:
        # The published factors are Python doubles rounded to float32; a float32 product differs in the last place.
        factor = jnp.asarray([1.0 - i * _OMSE_STEP for i in range(_OMSE_CANDIDATES)], jnp.float32)[index]
        return jax.tree.map(lambda bound: bound * factor, found)

    def score(index: Array) -> Array:
        return jnp.mean(_mean(_squared_errors(x, uniform_from_range(shrunk(index), spec)), 1))

    scores = jax.lax.map(score, jnp.arange(_OMSE_CANDIDATES))
    return uniform_from_range(shrunk(jnp.argmin(scores)), spec)


def _power_of_two_factor(found: Range, x: Array, spec: SiteSpec) -> Uniform:
    """One scale times 2^k for each channel, k from 0 to 3 by squared error (FQ-ViT, section 3.2, equation 7).

    The zero point follows from the largest scale and the overall minimum and serves all four, as published.
    """
    whole = uniform_from_range(Range(jnp.min(found.minimum), jnp.max(found.maximum)), spec)
    finest = whole.scale / 2**LARGEST_EXPONENT
    scales = [finest * 2**k for k in range(LARGEST_EXPONENT + 1)]
    errors = jnp.stack([_mean(_squared_errors(x, whole.with_scale(scale)), 0) for scale in scales])
    scale = jnp.stack(scales)[jnp.argmin(errors, 0)]
    return Uniform(scale, whole.zero_point, whole.low, whole.high)


_MEASURES: dict[str, Callable[[Array, SiteSpec], Range]] = {"percentile": _quantiles}
_MERGES: dict[str, Callable[[Range, Range], Range]] = {"ema": _moving, "percentile": _moving}
_FITS: dict[str, Callable[[Range, Array, SiteSpec], Uniform]] = {"omse": _omse, "ptf": _power_of_two_factor}


def update(spec: SiteSpec, previous: Range | None, x: Float[Array, "..."]) -> Range:
    """The site's range after one more batch; previous is None for the first."""
    new = _MEASURES.get(spec.observer, _extremes)(x, spec)
    return new if previous is None else _MERGES.get(spec.observer, _widest)(previous, new)


def fit(spec: SiteSpec, found: Range, x: Float[Array, "..."]) -> Quantizer:
    """The site's quantizer: parameters from the range over all batches, scored on x where the observer scores.

    x is the last calibration batch: the published observers score candidates on that one alone.
    """
    if spec.quantizer == "log2":
        return Log2(jnp.float32(grid(spec.bits, signed=False)[1]))
    uniform = _FITS.get(spec.observer, _from_range)(found, x, spec)
    return BiasCorrected(uniform, jnp.ones_like(uniform.scale)) if spec.bias_correction else uniform
