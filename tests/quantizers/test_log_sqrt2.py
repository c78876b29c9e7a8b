"""The log-sqrt2 quantizer: powers of sqrt(2), computed as powers of two and one of two scales."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cptv_jax.quantizers import LogSqrt2


def make(bits: int, scale: float = 1.0) -> LogSqrt2:
    return LogSqrt2(jnp.float32(scale), jnp.float32(2**bits - 1))


@pytest.mark.parametrize("bits", [2, 3, 4, 6])
def test_codes_stand_for_powers_of_sqrt2_and_the_one_past_the_largest_for_zero(bits: int) -> None:
    codes = np.arange(2**bits + 1)
    values = np.asarray(make(bits, 0.75).values(jnp.asarray(codes, jnp.float32)))
    expected = np.where(codes < 2**bits, 0.75 * 2.0 ** (-codes / 2), 0)
    np.testing.assert_allclose(values, expected, rtol=2.5e-7)  # two float32 roundings, of the odd scale and of scale
    np.testing.assert_array_equal(make(bits, 0.75).codes(jnp.asarray(values)), codes)


def test_the_inference_form_shifts_bits_and_chooses_a_scale_by_parity() -> None:
    exponents, factors = make(4).log2_form(jnp.arange(16, dtype=jnp.float32))
    np.testing.assert_array_equal(exponents, [0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7, 8])
    np.testing.assert_array_equal(factors[::2], np.ones(8))
    np.testing.assert_allclose(factors[1::2], np.full(8, 2**0.5), rtol=1e-7)


@settings(deadline=None, max_examples=100)
@given(x=st.floats(2.0**-20, 1.5), bits=st.integers(2, 4), scale=st.floats(0.05, 1.0))
def test_values_between_are_rounded_in_the_exponent(x: float, bits: int, scale: float) -> None:
    x, scale = float(np.float32(x)), float(np.float32(scale))
    exact = -2 * np.log2(x / scale)
    if abs(exact % 1 - 0.5) > 1e-4:  # float32 decides the ties
        assert float(make(bits, scale).codes(jnp.asarray(x))) == np.clip(np.rint(exact), 0, 2**bits)


def test_zero_becomes_zero_and_what_is_above_scale_is_clipped_to_it() -> None:
    quantizer = make(4, 0.5)
    np.testing.assert_array_equal(quantizer.codes(jnp.asarray([0.0, 0.9])), [16, 0])
    np.testing.assert_array_equal(quantizer.values(quantizer.codes(jnp.asarray([0.0, 0.9]))), [0.0, 0.5])


def test_steps_times_scale_are_values() -> None:
    x = jnp.asarray(np.logspace(-5, 0, 50), jnp.float32)
    quantizer = make(4, 0.7)
    np.testing.assert_array_equal(quantizer.steps(x) * quantizer.scale, quantizer.values(quantizer.codes(x)))
    wider = quantizer.with_scale(jnp.float32(1.4))
    np.testing.assert_array_equal(wider.codes(2 * x), quantizer.codes(x))
