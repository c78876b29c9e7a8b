"""What an optimizer step is relative to: a tensor's own gradients, all of its elements together."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from cptv_jax.runtime.optimizers import adam_by_tensor, zero_nonfinite

B1, B2 = 0.9, 0.99


def test_updates_are_adams_with_the_mean_square_of_the_tensor() -> None:
    rng = np.random.default_rng(0)
    gradients = rng.normal(size=(5, 3, 4)) * np.array([1e-8, 1, 1e8])[:, None]
    optimizer = adam_by_tensor(B1, B2)
    state = optimizer.init({"a": jnp.zeros((3, 4)), "b": jnp.zeros(())})
    mean, square = np.zeros((3, 4)), 0.0
    for count, g in enumerate(gradients, 1):
        updates, state = optimizer.update({"a": jnp.float32(g), "b": jnp.float32(0)}, state)
        mean, square = B1 * mean + (1 - B1) * g, B2 * square + (1 - B2) * np.mean(g * g)
        expected = mean / (1 - B1**count) / np.sqrt(square / (1 - B2**count))
        np.testing.assert_allclose(updates["a"], expected, rtol=1e-5)  # a few roundings of float32
        assert updates["b"] == 0  # nothing to be relative to


def test_a_single_element_moves_as_with_adam() -> None:
    ours, theirs = adam_by_tensor(B1, B2), optax.scale_by_adam(B1, B2, eps=0.0)
    state, other = ours.init(jnp.zeros(())), theirs.init(jnp.zeros(()))
    for g in (0.3, -2.0, 0.01):
        update, state = ours.update(jnp.float32(g), state)
        expected, other = theirs.update(jnp.float32(g), other)
        np.testing.assert_allclose(update, expected, rtol=1e-5)  # a few roundings of float32


def test_the_scale_of_a_loss_does_not_matter() -> None:
    gradients = jax.random.normal(jax.random.key(0), (4, 6))
    optimizer = adam_by_tensor()
    first, _ = optimizer.update(gradients, optimizer.init(gradients))
    second, _ = optimizer.update(1e-6 * gradients, optimizer.init(gradients))
    np.testing.assert_allclose(first, second, rtol=1e-5)  # a few roundings of float32


def test_gradients_whose_squares_are_no_float32_any_more_hardly_move_anything() -> None:
    gradients = jnp.full(3, 1e-22, jnp.float32)
    optimizer = adam_by_tensor()
    updates, _ = optimizer.update(gradients, optimizer.init(gradients))
    assert np.max(np.abs(updates)) < 1e-6


def test_what_is_no_number_moves_nothing() -> None:
    gradients = jnp.array([1.0, jnp.nan, jnp.inf])
    optimizer = adam_by_tensor()
    updates, state = optimizer.update(gradients, optimizer.init(gradients))
    np.testing.assert_array_equal(updates[1:], [0, 0])
    assert updates[0] > 0 and all(jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(state))


def test_a_gradient_that_is_no_number_moves_nothing_and_spoils_no_later_step() -> None:
    descent = optax.chain(zero_nonfinite(), optax.adam(0.1))
    parameters = {"scale": jnp.ones(4)}
    moments = descent.init(parameters)
    for gradient in ([jnp.nan, jnp.inf, -jnp.inf, 1.0], [1.0, 1.0, 1.0, 1.0]):
        updates, moments = descent.update({"scale": jnp.asarray(gradient)}, moments, parameters)
        moved = np.asarray(updates["scale"])
        assert np.isfinite(moved).all()
        assert np.array_equal(moved[:3] != 0, [gradient[0] == 1.0] * 3) and moved[3] < 0
