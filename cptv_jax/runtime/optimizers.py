"""Gradient transformations that every gradient descent on quantizers shares."""

import jax
import jax.numpy as jnp
import optax
from jaxtyping import PyTree


def _replace_nonfinite(gradients: PyTree, parameters: PyTree) -> PyTree:
    return jax.tree.map(lambda g: jnp.where(jnp.isfinite(g), g, 0.0), gradients)


def zero_nonfinite() -> optax.GradientTransformation:
    """Replaces non-finite gradients by zero.

    The deviation of a constant channel has no gradient (bias correction), so one such channel would spoil a descent.

    Returns:
        An optax transformation without a state.
    """
    return optax.stateless(_replace_nonfinite)


_EPSILON = 1e-15  # added to a root mean square; far above 1e-19, whose square underflows float32


def adam_by_tensor(b1: float = 0.9, b2: float = 0.99) -> optax.GradientTransformation:
    """Scales averaged gradients by one root mean square per tensor (Adam-mini, arXiv 2406.16793).

    Adam moves every element alike, however little it matters; with few images that fits them by chance. Non-finite
    gradients count as 0.

    Args:
        b1: Decay of the average of gradients.
        b2: Decay of the average of a tensor's mean squared gradient.

    Returns:
        An optax transformation; its updates have the sign of the gradients and no learning rate.
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
