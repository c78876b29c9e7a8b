"""Calibration statistics, and the quantizer parameters that follow from them.

Two open tables decide how the statistics-based methods (fq-vit, omse) treat a site. STATISTICS, by the site's observer,
says how a range is kept and how a uniform grid follows from it. FITS, by the site's quantizer, says which quantizer is
made of the range. Users add their own quantizers with `register_fit` and observers with `register_observer`.

A new quantizer for attention maps takes a class, a function and two registrations:

    register_quantizer("CubeRoot", CubeRoot)  # by which saved models find the class

    def fit_cube_root(spec: SiteSpec, found: Range, x: Array) -> CubeRoot:
        return CubeRoot(found.maximum, jnp.float32(2.0**spec.bits - 1))

    register_fit("cube-root", fit_cube_root, attention_only=True)
    recipe = RecipeConfig(overrides={"*.softmax": {"quantizer": "cube-root", "observer": "minmax"}})
    config = QuantizeConfig(method=OmseOptions(), recipe=recipe)
"""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from cptv_jax.quantizers import LARGEST_EXPONENT, BiasCorrected, Log2, Quantizer, Uniform, grid, true_divide
from cptv_jax.recipe.spec import OBSERVER_RULES, QUANTIZER_RULES, ObserverRules, QuantizerRules, SiteSpec
from cptv_jax.registry import Registry

_SMALLEST_SCALE = float(jnp.finfo(jnp.float32).eps)
_EMA_MOMENTUM = 0.01  # weight of the newest batch, for EMA and percentile
_PERCENTILE = 0.99999
_OMSE_CANDIDATES = 90
_OMSE_STEP = 0.01


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Range:
    """Running minimum and maximum of a site: () per tensor, (channels,) per channel.

    Attributes:
        minimum: The smallest value, or the observer's estimate of it.
        maximum: The largest value, or the observer's estimate of it.
    """

    minimum: Float[Array, "..."]
    maximum: Float[Array, "..."]


def _measure_extremes(x: Float[Array, "..."], spec: SiteSpec) -> Range:
    """Returns the smallest and the largest value."""
    axes = tuple(range(x.ndim - 1)) if spec.per_channel else None
    return Range(jnp.min(x, axes), jnp.max(x, axes))


def _measure_quantiles(x: Float[Array, "..."], spec: SiteSpec) -> Range:
    """Returns the quantiles at 1 - 0.99999 and at 0.99999 of the whole tensor."""
    flat = x.reshape(-1)
    return Range(jnp.quantile(flat, 1.0 - _PERCENTILE), jnp.quantile(flat, _PERCENTILE))


def _widen(old: Range, new: Range) -> Range:
    """Returns the range that covers both."""
    return Range(jnp.minimum(old.minimum, new.minimum), jnp.maximum(old.maximum, new.maximum))


def _move_towards(old: Range, new: Range) -> Range:
    """Returns the exponential moving average."""
    return jax.tree.map(lambda a, b: a + _EMA_MOMENTUM * (b - a), old, new)


def uniform_from_range(found: Range, spec: SiteSpec) -> Uniform:
    """Spreads the integer grid over a range (FQ-ViT, equations 2 and 3).

    Args:
        found: The range.
        spec: The site's specification: bits, signed, symmetric.

    Returns:
        The uniform quantizer, whose scale and zero point have the shape of the range.
    """
    low, high = (jnp.float32(bound) for bound in grid(spec.bits, spec.signed))
    if spec.symmetric:
        largest = jnp.maximum(-found.minimum, found.maximum)
        scale = jnp.maximum(true_divide(largest, (high - low) / 2), _SMALLEST_SCALE)
        return Uniform(scale, jnp.zeros_like(scale), low, high)
    scale = jnp.maximum(true_divide(found.maximum - found.minimum, high - low), _SMALLEST_SCALE)
    zero_point = jnp.clip(low - jnp.round(true_divide(found.minimum, scale)), low, high)
    return Uniform(scale, zero_point, low, high)


def _fit_range(found: Range, x: Array, spec: SiteSpec) -> Uniform:
    return uniform_from_range(found, spec)


def _squared_errors(x: Float[Array, "... channels"], quantizer: Uniform) -> Float[Array, "rows channels"]:
    """Returns a quantizer's squared errors on x."""
    return ((quantizer.values(quantizer.codes(x)) - x) ** 2).reshape(-1, x.shape[-1])


def _mean(x: Float[Array, "rows columns"], axis: int) -> Float[Array, "..."]:
    """Returns the mean along an axis."""
    # As a product with ones, which XLA's CPU backend vectorizes: three times as fast as a reduction.
    ones = jnp.ones(x.shape[axis], x.dtype)
    return jnp.tensordot(x, ones, (axis, 0), precision=jax.lax.Precision.HIGHEST) / x.shape[axis]


def _fit_omse(found: Range, x: Array, spec: SiteSpec) -> Uniform:
    """Returns the range shrunk by the factor, of 90, with the least squared error on x (OMSE; one for all channels)."""

    def shrink(index: Array) -> Range:
        # The published factors are Python doubles rounded to float32; a float32 product differs in the last place.
        factor = jnp.asarray([1.0 - i * _OMSE_STEP for i in range(_OMSE_CANDIDATES)], jnp.float32)[index]
        return jax.tree.map(lambda bound: bound * factor, found)

    def score(index: Array) -> Array:
        return jnp.mean(_mean(_squared_errors(x, uniform_from_range(shrink(index), spec)), 1))

    scores = jax.lax.map(score, jnp.arange(_OMSE_CANDIDATES))
    return uniform_from_range(shrink(jnp.argmin(scores)), spec)


def _fit_power_of_two_factor(found: Range, x: Array, spec: SiteSpec) -> Uniform:
    """Returns one scale times 2^k for each channel, k from 0 to 3 by squared error (FQ-ViT, section 3.2, equation 7).

    The zero point follows from the largest scale and the overall minimum and serves all four, as published.
    """
    whole = uniform_from_range(Range(jnp.min(found.minimum), jnp.max(found.maximum)), spec)
    finest = whole.scale / 2**LARGEST_EXPONENT
    scales = [finest * 2**k for k in range(LARGEST_EXPONENT + 1)]
    errors = jnp.stack([_mean(_squared_errors(x, whole.with_scale(scale)), 0) for scale in scales])
    scale = jnp.stack(scales)[jnp.argmin(errors, 0)]
    return Uniform(scale, whole.zero_point, whole.low, whole.high)


@dataclass(frozen=True)
class Statistic:
    """What an observer keeps of the calibration batches, and the uniform grid that follows from it.

    Attributes:
        measure: Returns the range of one batch, from its tensor and the specification.
        merge: Returns the range from then on, from the range so far and that of a new batch.
        fit: Returns the grid, from the range over all batches, the last batch's tensor and the specification.
    """

    measure: Callable[[Array, SiteSpec], Range] = _measure_extremes
    merge: Callable[[Range, Range], Range] = _widen
    fit: Callable[[Range, Array, SiteSpec], Uniform] = _fit_range


Fit = Callable[[SiteSpec, Range, Array], Quantizer]
"""From a specification, the range over all batches and the last batch's tensor to a quantizer; traced by jax.jit."""

STATISTICS: Registry[Statistic] = Registry("observer")
FITS: Registry[Fit] = Registry("quantizer fit")


def register_observer(name: str, statistic: Statistic, per_channel: bool | None = None) -> Statistic:
    """Makes an observer known to recipes and to the statistics-based methods.

    Args:
        name: What recipes call it.
        statistic: What it does.
        per_channel: Whether a site must have a scale for each channel (True) or one for the whole tensor (False); None
            allows both.

    Returns:
        The statistic.

    Raises:
        InputError: The name belongs to another observer.

    Example:
        >>> def half_range(x, spec):
        ...     return Range(jnp.min(x) / 2, jnp.max(x) / 2)
        >>> register_observer("half", Statistic(measure=half_range), per_channel=False)
    """
    if name not in STATISTICS:  # the registry of statistics refuses a second registration
        OBSERVER_RULES.register(name, ObserverRules(per_channel))
    return STATISTICS.register(name, statistic)


def register_fit(name: str, fit: Fit, attention_only: bool = False) -> Fit:
    """Makes a quantizer known to recipes and to the statistics-based methods.

    Args:
        name: What recipes call the quantizer.
        fit: Makes the quantizer of a site.
        attention_only: The quantizer's levels are those of values from 0 to 1, so recipes may ask for it at attention
            maps only.

    Returns:
        The function.

    Raises:
        InputError: The name belongs to another quantizer.

    Example:
        >>> def fit_cube_root(spec, found, x):
        ...     return CubeRoot(found.maximum, jnp.float32(2.0**spec.bits - 1))
        >>> register_fit("cube-root", fit_cube_root, attention_only=True)
    """
    if name not in FITS:  # the registry of fits refuses a second registration
        QUANTIZER_RULES.register(name, QuantizerRules(attention_only))
    return FITS.register(name, fit)


def _fit_uniform(spec: SiteSpec, found: Range, x: Array) -> Uniform:
    return STATISTICS[spec.observer].fit(found, x, spec)


def _fit_log2(spec: SiteSpec, found: Range, x: Array) -> Log2:
    return Log2(jnp.float32(grid(spec.bits, signed=False)[1]))


# Recipes know these names already.
STATISTICS.register("minmax", Statistic())
STATISTICS.register("ema", Statistic(merge=_move_towards))
STATISTICS.register("percentile", Statistic(_measure_quantiles, _move_towards))
STATISTICS.register("omse", Statistic(fit=_fit_omse))
STATISTICS.register("ptf", Statistic(fit=_fit_power_of_two_factor))
FITS.register("uniform", _fit_uniform)
FITS.register("log2", _fit_log2)


def update(spec: SiteSpec, previous: Range | None, x: Float[Array, "..."]) -> Range:
    """Updates a site's range by one more batch.

    Args:
        spec: The site's specification.
        previous: The range so far; None for the first batch.
        x: The batch's tensor.

    Returns:
        The range from then on.
    """
    statistic = STATISTICS[spec.observer]
    new = statistic.measure(x, spec)
    return new if previous is None else statistic.merge(previous, new)


def fit(spec: SiteSpec, found: Range, x: Float[Array, "..."]) -> Quantizer:
    """Makes a site's quantizer.

    Args:
        spec: The site's specification.
        found: The range over all batches.
        x: The last calibration batch's tensor; the published observers score candidates on it alone.

    Returns:
        The quantizer.
    """
    quantizer = FITS[spec.quantizer](spec, found, x)
    return BiasCorrected(quantizer, jnp.ones_like(quantizer.scale)) if spec.bias_correction else quantizer  # type: ignore[arg-type]
