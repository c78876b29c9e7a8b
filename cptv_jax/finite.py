"""Gradients without what is no number, for every descent on quantizers."""

import jax
import jax.numpy as jnp
import optax
from jaxtyping import PyTree


def _finite(gradients: PyTree, parameters: PyTree) -> PyTree:
    return jax.tree.map(lambda g: jnp.where(jnp.isfinite(g), g, 0.0), gradients)


def finite_gradients() -> optax.GradientTransformation:
    """Zero where a gradient is no number: the deviation of a constant channel has none (bias correction)."""
    return optax.stateless(_finite)
