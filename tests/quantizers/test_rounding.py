"""Division is rounded once, as NumPy and PyTorch do it, in every way that the library calls it."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from cptv_jax.quantizers import rounded_product, true_divide

# Results stay far from 2^-126: below it XLA may flush to zero, where NumPy goes on with fewer bits.
MAGNITUDES = st.floats(2.0**-40, 2.0**40, width=32) | st.floats(-(2.0**40), -(2.0**-40), width=32)
POSITIVE = st.floats(2.0**-40, 2.0**40, width=32)
NUMERATORS = arrays(np.float32, (16, 8), elements=MAGNITUDES | st.just(0.0) | st.integers(-512, 512).map(float))
COMPILED = jax.jit(true_divide)


@settings(deadline=None, max_examples=60)
@given(x=NUMERATORS, scalar=POSITIVE, vector=arrays(np.float32, 8, elements=POSITIVE))
def test_scalar_and_vector_denominators_divide_as_numpy_does(x: np.ndarray, scalar: float, vector: np.ndarray) -> None:
    for denominator in (np.float32(scalar), vector):
        expected = x / denominator
        for divide in (COMPILED, true_divide):
            np.testing.assert_array_equal(divide(jnp.asarray(x), jnp.asarray(denominator)), expected)


# Most integers divided by these differ in the last place from a product with the rounded reciprocal.
CONSTANTS = (3.0, 127.5, 255.0, 2 / 255)


@pytest.mark.parametrize("constant", CONSTANTS)
def test_a_constant_denominator_is_not_replaced_by_its_reciprocal(constant: float) -> None:
    x = np.arange(-4096, 4096, dtype=np.float32).reshape(64, 128)
    expected = x / np.float32(constant)
    assert (x * (np.float32(1) / np.float32(constant)) != expected).any()  # the fault would show
    closed_over = jnp.full(128, constant, jnp.float32)
    ways: tuple[Callable[[jax.Array], jax.Array], ...] = (
        lambda x: true_divide(x, constant),
        lambda x: true_divide(x, jnp.float32(constant)),
        lambda x: true_divide(x, closed_over),
    )
    for way in ways:
        np.testing.assert_array_equal(jax.jit(way)(x), expected)
        np.testing.assert_array_equal(way(jnp.asarray(x)), expected)


def test_a_denominator_mapped_over_a_population_divides_as_numpy_does() -> None:
    x = np.arange(-600, 600, dtype=np.float32).reshape(150, 8)
    denominators = np.linspace(0.1, 3.0, 5, dtype=np.float32)
    result = jax.jit(jax.vmap(true_divide, (None, 0)))(x, denominators)
    np.testing.assert_array_equal(result, x / denominators[:, None, None])


def test_infinities_and_nan_are_kept() -> None:
    x = np.array([np.inf, -np.inf, np.nan, 0.0, -0.0, 7.0], np.float32)
    result = np.asarray(COMPILED(x, jnp.float32(3.0)))
    np.testing.assert_array_equal(result, x / np.float32(3.0))  # treats NaN as equal to NaN
    np.testing.assert_array_equal(np.signbit(result[3:5]), [False, True])


def test_a_rounded_product_is_not_contracted_with_a_sum() -> None:
    """x * y + z in one loop: XLA's CPU compiler makes it one operation with one rounding, ours has two."""
    rng = np.random.default_rng(3)
    x, y, z = (rng.normal(size=4096).astype(np.float32) for _ in range(3))
    found = jax.jit(lambda x, y, z: rounded_product(x, y) + z)(x, y, z)
    np.testing.assert_array_equal(found, x * y + z)


def test_a_rounded_product_keeps_nan_and_infinity() -> None:
    found = jax.jit(rounded_product)(np.array([np.nan, np.inf, -np.inf], np.float32), np.float32(2))
    np.testing.assert_array_equal(found, [np.nan, np.inf, -np.inf])
