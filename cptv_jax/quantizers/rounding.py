"""Arithmetic with one rounding per operation, whatever the compiler makes of its surroundings."""

import jax.numpy as jnp
from jaxtyping import Array, Float


def true_divide(numerator: Float[Array, "..."], denominator: Float[Array, "..."] | float) -> Float[Array, "..."]:
    """Divides with one rounding, as IEEE 754 and the published PyTorch code have it.

    XLA turns division by a broadcast or constant into multiplication by a rounded reciprocal, which is one unit in the
    last place off and moves values that lie on a rounding tie by a whole step (pixels of exactly -1, the extreme weight
    of a symmetric channel). A denominator that seems to depend on each element is divided by as written. The comparison
    is false only for NaN, which stays NaN.

    Args:
        numerator: The numerator.
        denominator: The denominator, which broadcasts.

    Returns:
        The quotient.
    """
    return numerator / jnp.where(numerator == numerator, denominator, 1.0)


def rounded_product(a: Float[Array, "..."] | float, b: Float[Array, "..."] | float) -> Float[Array, "..."]:
    """Multiplies and rounds before anything is added to the product, as the published PyTorch code has it.

    XLA's CPU compiler contracts a product and a sum to one operation where it compiles both in one loop. Which
    operations share a loop depends on shapes and surroundings, and the last place of the sum with it.

    Args:
        a: The first factor.
        b: The second factor, which broadcasts.

    Returns:
        The product.
    """
    product = jnp.asarray(a * b)
    return jnp.where(product == product, product, jnp.nan)
