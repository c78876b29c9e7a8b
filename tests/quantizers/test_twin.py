"""Twin uniform quantizers against transcriptions of PTQ4ViT's published formulas, and the properties of their grids."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cptv_jax.quantizers import TwinGelu, twin_softmax

BITS = st.integers(2, 8)
PROBABILITIES = st.lists(st.floats(0, 1, width=32, allow_subnormal=False), min_size=50, max_size=50)
REALS = st.lists(st.floats(-10, 10, width=32, allow_subnormal=False), min_size=50, max_size=50)
INTERVALS = st.floats(2.0**-7, 1, width=32)
GELU_RANGE = 0.16997124254703522


def published_softmax(x: np.ndarray, bits: int, split: float) -> np.ndarray:
    """The published post-softmax formula (golden README, fact 19)."""
    levels = 2 ** (bits - 1) - 1
    interval = split / levels
    return np.round(np.clip(x, split, 1) * levels) / levels + np.round(np.clip(x, 0, split) / interval) * interval


def published_gelu(x: np.ndarray, bits: int, interval: float) -> np.ndarray:
    """The published post-GELU formula (golden README, fact 20)."""
    q = 2 ** (bits - 1)
    negative = GELU_RANGE / q
    positive_part = np.clip(np.round(x / interval), 0, q - 1) * interval
    return positive_part + np.clip(np.round(x / negative), -q, 0) * negative


def gelu_quantizer(bits: int, interval: float) -> TwinGelu:
    q = 2.0 ** (bits - 1)
    return TwinGelu(jnp.float32(interval), jnp.float32(GELU_RANGE / q), jnp.float32(-q), jnp.float32(q - 1))


def off_ties(x: np.ndarray, *steps: float) -> np.ndarray:
    """The values that do not lie so near to a rounding tie of a grid that float32 could decide it either way."""
    distances = [np.abs(x / step - np.floor(x / step) - 0.5) for step in steps]
    return x[np.min(distances, 0) > 1e-3]


@pytest.mark.parametrize("bits", [3, 4, 6, 8])
@pytest.mark.parametrize("exponent", [0, 1, 3, 6, 11])
def test_the_overlapping_form_is_the_published_formula(bits: int, exponent: int) -> None:
    split, levels = 2.0**-exponent, 2 ** (bits - 1) - 1
    x = np.random.default_rng(0).uniform(0, 1, 4000) ** 3
    x = off_ties(x[np.abs(x - split) > 1e-6], split / levels, 1 / levels)
    quantizer = twin_softmax(bits, jnp.float32(split), overlap=True)
    found = quantizer.values(quantizer.codes(jnp.asarray(x, jnp.float32)))
    np.testing.assert_allclose(found, published_softmax(x, bits, split), atol=3e-7)  # a few roundings of values to 1


@pytest.mark.parametrize("bits", [3, 6, 8])
@pytest.mark.parametrize("exponent", [0, 2, 5, 11])
def test_the_piecewise_form_differs_from_the_published_one_by_its_offset(bits: int, exponent: int) -> None:
    split, levels = 2.0**-exponent, 2 ** (bits - 1) - 1
    x = np.random.default_rng(1).uniform(0, 1, 4000) ** 3
    x = off_ties(x[np.abs(x - split) > 1e-6], split / levels, 1 / levels)
    quantizer = twin_softmax(bits, jnp.float32(split))
    found = np.asarray(quantizer.values(quantizer.codes(jnp.asarray(x, jnp.float32))))
    offset = np.where(x > split, split, np.round(split * levels) / levels)
    # Above the split the published formula minus its offset may fall below the split; the split itself is nearer.
    expected = np.where(x > split, np.maximum(published_softmax(x, bits, split) - offset, split), 0)
    expected = np.where(x > split, expected, published_softmax(x, bits, split) - offset)
    np.testing.assert_allclose(found, expected, atol=3e-7)


@pytest.mark.parametrize("bits", [3, 4, 6, 8])
def test_twin_gelu_is_the_published_formula(bits: int) -> None:
    interval = 0.08
    x = np.random.default_rng(2).normal(0, 3, 4000)
    x = off_ties(x, interval, GELU_RANGE / 2 ** (bits - 1))
    quantizer = gelu_quantizer(bits, interval)
    values = jnp.asarray(x, jnp.float32)
    np.testing.assert_allclose(quantizer.values(quantizer.codes(values)), published_gelu(x, bits, interval), rtol=1e-6)
    np.testing.assert_allclose(
        quantizer.steps(values) * quantizer.scale, quantizer.values(quantizer.codes(values)), rtol=3e-7
    )


@settings(deadline=None, max_examples=60)
@given(BITS, st.integers(0, 12), PROBABILITIES)
def test_twin_softmax_is_monotone_idempotent_and_as_near_as_its_grids_allow(
    bits: int, exponent: int, numbers: list[float]
) -> None:
    quantizer = twin_softmax(bits, jnp.float32(2.0**-exponent))
    x = np.sort(np.asarray(numbers, np.float32))
    codes = quantizer.codes(jnp.asarray(x))
    values = np.asarray(quantizer.values(codes))
    assert (np.diff(values) >= 0).all()
    np.testing.assert_array_equal(quantizer.values(quantizer.codes(jnp.asarray(values))), values)
    assert (codes == np.round(codes)).all() and (codes >= 0).all() and (codes < 2**bits).all()
    split, levels = 2.0**-exponent, 2 ** (bits - 1) - 1
    step = np.where(x > split, 1 / levels, split / levels)
    assert (np.abs(values - x) <= step / 2 * (1 + 1e-5)).all()


@settings(deadline=None, max_examples=60)
@given(BITS, st.integers(0, 12), PROBABILITIES)
def test_twin_softmax_steps_are_integers_in_fine_steps(bits: int, exponent: int, numbers: list[float]) -> None:
    quantizer = twin_softmax(bits, jnp.float32(2.0**-exponent))
    steps = np.asarray(quantizer.steps(jnp.asarray(numbers, jnp.float32)))
    np.testing.assert_array_equal(steps, np.round(steps))
    np.testing.assert_array_equal(steps * quantizer.scale, quantizer.values(quantizer.codes(jnp.asarray(numbers))))


@settings(deadline=None, max_examples=60)
@given(BITS, INTERVALS, REALS)
def test_twin_gelu_is_monotone_idempotent_and_within_half_a_step_in_range(
    bits: int, interval: float, numbers: list[float]
) -> None:
    quantizer = gelu_quantizer(bits, interval)
    x = np.sort(np.asarray(numbers, np.float32))
    values = np.asarray(quantizer.values(quantizer.codes(jnp.asarray(x))))
    assert (np.diff(values) >= 0).all()
    np.testing.assert_array_equal(quantizer.values(quantizer.codes(jnp.asarray(values))), values)
    q = 2 ** (bits - 1)
    step = np.where(x < 0, GELU_RANGE / q, interval)
    inside = (x >= -GELU_RANGE) & (x <= interval * (q - 1))
    assert (np.abs(values - x)[inside] <= (step / 2 * (1 + 1e-5))[inside]).all()


def test_another_scale_moves_both_softmax_ranges_and_only_the_positive_gelu_range() -> None:
    softmax = twin_softmax(4, jnp.float32(0.25))
    wider = softmax.with_scale(softmax.scale * 2)
    np.testing.assert_array_equal(wider.values(jnp.arange(16.0)), 2 * softmax.values(jnp.arange(16.0)))
    gelu = gelu_quantizer(4, 0.5)
    codes = jnp.arange(-8.0, 8.0)
    np.testing.assert_array_equal(
        gelu.with_scale(gelu.scale * 2).values(codes), gelu.values(codes) * jnp.where(codes < 0, 1, 2)
    )


def test_values_that_are_not_numbers_stay_so() -> None:
    assert np.isnan(gelu_quantizer(4, 0.5).codes(jnp.float32(np.nan)))
