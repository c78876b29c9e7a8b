"""The parameters of a quantizer that a search or a gradient may change, each under its name.

"scale": input units per step; a scalar for a quantizer with a scale per channel moves all channels by one factor.
"zero_point": as a fraction of the range of codes, so that it means the same at every width; it is rounded to a code.
"factor": of a bias-corrected weight's channels.
"rounding": of a weight's elements, in units of two steps, so that one rate serves them and the scales.
"start": the lower end of a focusing interval, as a fraction of the interval's length.
"exponents": of a quantizer's power-of-two factors (FQ-ViT, section 3.2), in units of 25 octaves, as one of them changes
    much. They are rounded to whole ones from 0 to 3, and count from "scale", which is given with them.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from cptv_jax.quantizers.base import Quantizer
from cptv_jax.quantizers.bias_correction import BiasCorrected
from cptv_jax.quantizers.focusing import Focusing
from cptv_jax.quantizers.rounding import rounded_product, true_divide
from cptv_jax.quantizers.straight_through import straight_through
from cptv_jax.quantizers.uniform import FractionalUniform, Uniform

LARGEST_EXPONENT = 3  # of power-of-two factors
_ROUNDING_UNIT = 2.0
_OCTAVES = 25.0  # a random step of one percent then moves one channel in twenty


def innermost(quantizer: Quantizer) -> Any:
    """The quantizer without what was put around it: bias correction, a low-rank term."""
    return innermost(quantizer.base) if hasattr(quantizer, "base") else quantizer


def with_zero_point(quantizer: Any, zero_point: Float[Array, "..."]) -> Any:
    """The quantizer with another zero point, in codes, rounded and clipped to a code; its derivative is 1.

    One that lies beyond the codes, as that of a range beside zero does, may stay there.
    """
    grid = innermost(quantizer)
    low, high = jnp.minimum(grid.low, grid.zero_point), jnp.maximum(grid.high, grid.zero_point)
    exact = jnp.clip(jnp.round(zero_point), low, high)
    return _with_grid(quantizer, zero_point=straight_through(exact, zero_point))


def with_rounding(quantizer: Any, rounding: Float[Array, "inputs outputs"]) -> Any:
    """The weight quantizer with another learned rounding, if it is one of a single uniform grid."""
    return _with_grid(quantizer, rounding=rounding) if isinstance(innermost(quantizer), Uniform) else quantizer


def _with_grid(quantizer: Any, **changes: Array) -> Any:
    if hasattr(quantizer, "base"):
        return replace(quantizer, base=_with_grid(quantizer.base, **changes))
    return replace(quantizer, **changes)


def offsets(quantizer: Quantizer) -> dict[str, Array]:
    """What of a quantizer can be changed, beside its scale: an asymmetric grid's zero point, an interval's start, the
    factor of a bias-corrected channel, the rounding of a weight that has a learned one.

    A fractional zero point (RepQ-ViT's) is no code and stays as it is.
    """
    if isinstance(quantizer, Focusing):
        return {"start": quantizer.start / (quantizer.high * quantizer.scale)}
    grid = innermost(quantizer)
    if isinstance(quantizer, FractionalUniform) or not hasattr(grid, "zero_point"):
        return {}
    found = {"zero_point": grid.zero_point / (grid.high - grid.low)}
    if isinstance(quantizer, BiasCorrected) and quantizer.factor.shape == quantizer.scale.shape:
        found["factor"] = quantizer.factor
    if getattr(grid, "rounding", None) is not None:
        found["rounding"] = true_divide(grid.rounding, _ROUNDING_UNIT)
    return found


def exponents(quantizer: Quantizer) -> Float[Array, " channels"]:
    """The exponents of a quantizer whose scales are power-of-two multiples of the smallest."""
    return true_divide(jnp.round(jnp.log2(true_divide(quantizer.scale, jnp.min(quantizer.scale)))), _OCTAVES)


def _powers_of_two(values: Float[Array, " channels"]) -> Float[Array, " channels"]:
    octaves = jnp.clip(values * _OCTAVES, 0, LARGEST_EXPONENT)
    exact = jnp.ldexp(jnp.float32(1), jnp.round(octaves).astype(jnp.int32))  # exp2 need not be exact
    return straight_through(exact, jnp.exp2(octaves))


def with_parameters(quantizer: Quantizer, values: Mapping[str, Array]) -> Quantizer:
    """The quantizer with the named parameters; the others stay."""
    if "scale" in values:
        scale = values["scale"]
        if "exponents" in values:
            scale = scale * _powers_of_two(values["exponents"])
        elif jnp.ndim(scale) < jnp.ndim(quantizer.scale):  # powers of two, if that is what the factors were, stay such
            scale = scale * true_divide(quantizer.scale, jnp.min(quantizer.scale))
        quantizer = quantizer.with_scale(scale)
    if "zero_point" in values:
        grid = innermost(quantizer)
        quantizer = with_zero_point(quantizer, values["zero_point"] * (grid.high - grid.low))
    if "factor" in values:
        assert isinstance(quantizer, BiasCorrected)
        quantizer = replace(quantizer, factor=values["factor"])
    if "rounding" in values:
        quantizer = with_rounding(quantizer, rounded_product(values["rounding"], _ROUNDING_UNIT))
    if "start" in values:
        assert isinstance(quantizer, Focusing)
        quantizer = replace(quantizer, start=values["start"] * (quantizer.high * quantizer.scale))
    return quantizer
