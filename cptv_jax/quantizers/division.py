"""Correctly rounded division."""

import jax.numpy as jnp
from jaxtyping import Array, Float


def true_divide(numerator: Float[Array, "..."], denominator: Float[Array, "..."] | float) -> Float[Array, "..."]:
    """numerator / denominator with one rounding, as IEEE 754 and the published PyTorch code have it.

    XLA turns division by a broadcast or constant into multiplication by a rounded reciprocal, which is one unit in
    the last place off and moves values that lie on a rounding tie by a whole step (pixels of exactly -1, the extreme
    weight of a symmetric channel). A denominator that seems to depend on each element is divided by as written.
    The comparison is false only for NaN, which stays NaN.
    """
    return numerator / jnp.where(numerator == numerator, denominator, 1.0)
