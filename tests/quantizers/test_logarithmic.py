"""The log2 quantizer: powers of two, and one more level for zero."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cptv_jax.quantizers import Log2


def make(bits: int) -> Log2:
    return Log2(jnp.float32(2**bits - 1))


@pytest.mark.parametrize("bits", [2, 3, 4, 6])
@pytest.mark.parametrize("run", [jax.jit, lambda f: f], ids=["compiled", "eager"])
def test_powers_of_two_are_kept_and_what_is_smaller_becomes_zero(bits: int, run) -> None:  # type: ignore[no-untyped-def]
    quantizer = make(bits)
    exponents = np.arange(2**bits + 10)
    x = (2.0**-exponents).astype(np.float32)
    found = run(quantizer.codes)(jnp.asarray(x))
    np.testing.assert_array_equal(found, np.minimum(exponents, 2**bits))
    # Exactly: an exponential that rounds would show in the last place.
    np.testing.assert_array_equal(run(quantizer.values)(found), np.where(exponents < 2**bits, x, 0))


def test_one_has_code_zero_and_zero_has_the_code_past_the_largest() -> None:
    np.testing.assert_array_equal(make(4).codes(jnp.asarray([1.0, 0.0])), [0, 16])
    np.testing.assert_array_equal(make(4).values(jnp.asarray([0.0, 15.0, 16.0])), [1.0, 2.0**-15, 0.0])


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_there_are_two_to_the_bits_powers_and_the_zero_level(bits: int) -> None:
    quantizer = make(bits)
    x = jnp.asarray(np.logspace(-12, 0, 3000), jnp.float32)
    levels = np.unique(quantizer.steps(x))
    np.testing.assert_array_equal(levels, [0.0, *sorted(2.0**-k for k in range(2**bits))])


@settings(deadline=None, max_examples=100)
@given(exponent=st.floats(0, 20), bits=st.integers(2, 4))
def test_values_between_powers_are_rounded_in_the_exponent(exponent: float, bits: int) -> None:
    x = np.float32(2.0**-exponent)
    exact = -np.log2(np.float64(x))
    code = float(make(bits).codes(jnp.asarray(x)))
    if abs(exact % 1 - 0.5) > 1e-5:  # float32's logarithm decides the ties
        assert code == min(np.rint(exact), 2**bits)


def test_steps_are_values_in_units_of_one() -> None:
    quantizer = make(4)
    x = jnp.asarray([0.9, 0.3, 0.04, 1e-6])
    np.testing.assert_array_equal(quantizer.steps(x), quantizer.values(quantizer.codes(x)))
    np.testing.assert_array_equal(quantizer.steps(x), [1.0, 0.25, 2.0**-5, 0.0])
    assert quantizer.scale == 1.0


def test_exponents_past_the_grid_become_the_zero_code() -> None:
    exponents = jnp.asarray([0.0, 15.0, 16.0, 40.0, jnp.inf])
    np.testing.assert_array_equal(make(4).clip_exponents(exponents), [0, 15, 16, 16, 16])


def test_there_is_no_scale_to_search() -> None:
    with pytest.raises(TypeError, match="no scale to search"):
        make(4).with_scale(jnp.float32(2.0))
