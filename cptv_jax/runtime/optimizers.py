"""Gradient transformations that every descent on quantizers shares."""

import jax
import jax.numpy as jnp
import optax
from jaxtyping import PyTree


def _replace_nonfinite(gradients: PyTree, parameters: PyTree) -> PyTree:
    return jax.tree.map(lambda g: jnp.where(jnp.isfinite(g), g, 0.0), gradients)


def zero_nonfinite() -> optax.GradientTransformation:
    """Zero where a gradient is no number: the deviation of a constant channel has none (bias correction)."""
    return optax.stateless(_replace_nonfinite)


_EPSILON = 1e-15  # beside a root mean square; far above 1e-19, whose square is no float32 any more


def adam_by_tensor(b1: float = 0.9, b2: float = 0.99) -> optax.GradientTransformation:
    """Gradients, averaged over b1, relative to the root of a tensor's mean square, averaged over b2 (Adam-mini, arXiv
    2406.16793).

    Adam moves every element alike, however little it matters; with few images that is what fits them by chance.
    Gradients that are no number count as 0.
    """

    def init(parameters: PyTree) -> tuple[jax.Array, PyTree, PyTree]:
        squares = jax.tree.map(lambda x: jnp.zeros((), x.dtype), parameters)
        return jnp.zeros((), jnp.int32), jax.tree.map(jnp.zeros_like, parameters), squares

    def update(
        gradients: PyTree, state: tuple[jax.Array, PyTree, PyTree], parameters: PyTree = None
    ) -> tuple[PyTree, tuple[jax.Array, PyTree, PyTree]]:
        count, means, squares = state
        count = count + 1
        means = jax.tree.map(lambda mean, g: b1 * mean + (1 - b1) * g, means, gradients)
        squares = jax.tree.map(lambda square, g: b2 * square + (1 - b2) * jnp.mean(g * g), squares, gradients)

        def relative(mean: jax.Array, square: jax.Array) -> jax.Array:
            return mean / (1 - b1**count) / (jnp.sqrt(square / (1 - b2**count)) + _EPSILON)

        return jax.tree.map(relative, means, squares), (count, means, squares)

    return optax.chain(zero_nonfinite(), optax.GradientTransformation(init, update))
