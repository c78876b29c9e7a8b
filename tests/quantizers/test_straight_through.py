"""Straight-through derivatives leave every value as it is, and are those of LSQ for uniform quantizers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cptv_jax.quantizers import BiasCorrected, Log2, Uniform, round_through, straight_through

GRID = Uniform(jnp.float32(0.25), jnp.float32(3.0), jnp.float32(0.0), jnp.float32(7.0))
# Codes before clipping: -1.8, 0.2, 2.6, 3, 6.8, 9.4; the second and the fifth round to a bound, the ends lie outside.
X = jnp.asarray([-1.2, -0.7, -0.1, 0.0, 0.95, 1.6], jnp.float32)
INSIDE = np.asarray([0, 1, 1, 1, 1, 0], np.float32)


@given(st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=20))
def test_rounding_keeps_its_values_and_gets_slope_one(values: list[float]) -> None:
    x = jnp.asarray(values, jnp.float32)
    y, slope = jax.jvp(round_through, (x,), (jnp.ones_like(x),))
    np.testing.assert_array_equal(y, np.round(np.asarray(x)))
    np.testing.assert_array_equal(slope, np.ones_like(x))


def test_the_value_is_the_exact_one_and_the_slope_the_smooth_ones() -> None:
    def through(x: jax.Array) -> jax.Array:
        return jnp.sum(straight_through(jnp.floor(x), x**2))

    value, slope = jax.value_and_grad(through)(jnp.asarray([1.7, -2.3]))
    assert value == 1 - 3
    np.testing.assert_allclose(slope, [3.4, -4.6], rtol=1e-6)


def test_a_slope_that_is_not_finite_in_the_exact_value_does_no_harm() -> None:
    slope = jax.grad(lambda x: straight_through(jnp.sqrt(x), x))(0.0)
    assert slope == 1.0


def test_uniform_values_pass_the_slope_within_the_bounds_and_none_outside() -> None:
    slope = jax.grad(lambda x: jnp.sum(GRID.values(GRID.codes(x))))(X)
    np.testing.assert_allclose(slope, INSIDE, rtol=1e-6)


def test_uniform_values_have_the_derivative_of_learned_step_sizes() -> None:
    # LSQ, equation 3: round(x / s) - x / s inside, the bound outside (in steps, as the zero point is fixed).
    slope = jax.jacfwd(lambda s: GRID.with_scale(s).values(GRID.with_scale(s).codes(X)))(GRID.scale)
    steps = np.asarray(GRID.steps(X))
    np.testing.assert_allclose(slope, np.where(INSIDE, steps - np.asarray(X) / 0.25, steps), atol=1e-5)


def test_logarithmic_values_pass_the_slope_at_zero_too() -> None:
    quantizer = Log2(jnp.float32(7.0))
    slope = jax.grad(lambda x: jnp.sum(quantizer.steps(x)))(jnp.asarray([0.0, 1e-6, 0.3, 1.0]))
    np.testing.assert_array_equal(slope, np.ones(4))


@pytest.mark.parametrize("quantizer", [GRID, BiasCorrected(GRID)])
def test_differentiating_changes_no_code(quantizer: Uniform | BiasCorrected) -> None:
    x = jnp.asarray(np.random.default_rng(0).uniform(-2, 2, (50, 4)), jnp.float32)
    value, _ = jax.vjp(quantizer.codes, x)
    np.testing.assert_array_equal(value, quantizer.codes(x))
