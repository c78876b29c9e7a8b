"""Straight-through derivatives: the value of a step function, the slope of a smooth one (Bengio et al. 2013)."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


@jax.custom_jvp
def _exact_with_slope_of(exact: Array, smooth: Array) -> Array:
    return exact


@_exact_with_slope_of.defjvp
def _slope(primals: tuple[Array, Array], tangents: tuple[Any, Array]) -> tuple[Array, Array]:
    return primals[0], tangents[1]


def straight_through(exact: Float[Array, "..."], smooth: Float[Array, "..."]) -> Float[Array, "..."]:
    """Returns `exact`, bit for bit, with the derivative of `smooth`.

    Where nothing is differentiated `smooth` is not computed under jit.

    Args:
        exact: The values.
        smooth: What is differentiated, of the same shape and dtype.
    """
    return _exact_with_slope_of(jax.lax.stop_gradient(exact), smooth)


def round_through(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Rounds half to even, with derivative 1.

    Args:
        x: The values to round.

    Returns:
        The rounded values.
    """
    return straight_through(jnp.round(x), x)


@jax.custom_jvp
def clip_through(x: Float[Array, "..."], low: Array | float, high: Array | float) -> Float[Array, "..."]:
    """Clips to fixed bounds; the derivative is 1 from bound to bound, the bounds included, and 0 outside.

    Args:
        x: The values to clip.
        low: The lower bound.
        high: The upper bound.

    Returns:
        The clipped values.
    """
    return jnp.clip(x, low, high)


@clip_through.defjvp
def _clip_slope(primals: tuple[Array, Any, Any], tangents: tuple[Array, Any, Any]) -> tuple[Array, Array]:
    x, low, high = primals
    slope = jnp.where((low <= x) & (x <= high), tangents[0], 0.0)
    return clip_through(x, low, high), slope
