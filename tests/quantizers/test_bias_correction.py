"""Bias correction gives back each output channel's mean and deviation."""

from dataclasses import replace

import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from cptv_jax.quantizers import BiasCorrected, Uniform, moments

INPUTS, OUTPUTS = 48, 6
# float32 means of 48 numbers: 6 roundings of 2^-24, the published epsilon of 1e-8 on deviations above 0.05, some slack.
TOLERANCE = 2e-6


def random_weight(seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (rng.normal(size=(INPUTS, OUTPUTS)) * rng.uniform(0.1, 1, OUTPUTS) + rng.normal(size=OUTPUTS) / 4).astype(
        np.float32
    )


def four_bits(weight: np.ndarray) -> BiasCorrected:
    low, high = weight.min(0), weight.max(0)
    scale = (high - low) / 15
    zero_point = np.rint(-low / scale)
    return BiasCorrected(Uniform(*(jnp.asarray(a, jnp.float32) for a in (scale, zero_point, 0, 15))))


def effective(quantizer: BiasCorrected, weight: np.ndarray, steps: jnp.ndarray | None = None) -> np.ndarray:
    """gain * steps * scale + shift, in float64."""
    steps = quantizer.steps(jnp.asarray(weight)) if steps is None else steps
    gain, shift = quantizer.correction(moments(jnp.asarray(weight)), steps)
    assert gain.shape == shift.shape == (OUTPUTS,)
    gain64, steps64, scale, shift64 = (np.asarray(a, np.float64) for a in (gain, steps, quantizer.scale, shift))
    return gain64 * steps64 * scale + shift64


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 2**32 - 1))
def test_mean_and_unbiased_deviation_of_each_channel_are_restored(seed: int) -> None:
    weight = random_weight(seed)
    quantizer = four_bits(weight)
    found = effective(quantizer, weight)
    exact = np.float64(weight)
    np.testing.assert_allclose(found.mean(0), exact.mean(0), rtol=0, atol=TOLERANCE)
    np.testing.assert_allclose(found.std(0, ddof=1), exact.std(0, ddof=1), rtol=TOLERANCE)
    # The uncorrected weight misses them by far more.
    plain = np.float64(quantizer.values(quantizer.codes(jnp.asarray(weight))))
    assert np.abs(plain.std(0, ddof=1) - exact.std(0, ddof=1)).max() > 100 * TOLERANCE


def test_deviations_are_unbiased_and_padded_with_the_published_epsilon() -> None:
    # Deviations as small as the epsilon: the only place where it, and the divisor inputs - 1, can be seen.
    weight = np.zeros((2, 1), np.float32)
    weight[1] = 3e-8
    base = Uniform(*(jnp.asarray(a, jnp.float32) for a in (1e-8, 0, 0, 255)))
    gain, shift = BiasCorrected(base).correction(moments(jnp.asarray(weight)), jnp.asarray([[0.0], [4.0]]))
    expected_gain = (3e-8 / 2**0.5) / (4e-8 / 2**0.5 + 1e-8)
    np.testing.assert_allclose(gain, [expected_gain], rtol=1e-6)
    np.testing.assert_allclose(shift, [1.5e-8 - expected_gain * 2e-8], rtol=1e-5)


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 2**32 - 1), factor=st.floats(0.25, 4.0))
def test_the_magnitude_of_a_scale_cancels(seed: int, factor: float) -> None:
    weight = random_weight(seed)
    quantizer = four_bits(weight)
    steps = quantizer.steps(jnp.asarray(weight))
    rescaled = quantizer.with_scale(quantizer.scale * np.float32(factor))
    np.testing.assert_allclose(
        effective(rescaled, weight, steps), effective(quantizer, weight, steps), rtol=0, atol=5 * TOLERANCE
    )


def test_a_factor_multiplies_the_corrected_weight_of_its_channel() -> None:
    weight = random_weight(2)
    quantizer = four_bits(weight)
    factor = np.linspace(0.5, 1.5, OUTPUTS).astype(np.float32)
    found = effective(replace(quantizer, factor=jnp.asarray(factor)), weight)
    np.testing.assert_allclose(found, effective(quantizer, weight) * factor, rtol=0, atol=TOLERANCE)
    # And a factor of one is no rounding at all.
    given = moments(jnp.asarray(weight)), quantizer.steps(jnp.asarray(weight))
    for a, b in zip(
        replace(quantizer, factor=jnp.ones(OUTPUTS)).correction(*given), quantizer.correction(*given), strict=True
    ):
        np.testing.assert_array_equal(a, b)


def test_a_weight_on_the_grid_comes_back_whichever_scale_represents_it() -> None:
    steps = np.random.default_rng(0).integers(-7, 8, (INPUTS, OUTPUTS))
    weight = (steps * 2.0**-5).astype(np.float32)
    for scale in (2.0**-5, 2.0**-6, 2.0**-7):
        base = Uniform(*(jnp.asarray(a, jnp.float32) for a in (np.full(OUTPUTS, scale), 0, -128, 127)))
        np.testing.assert_allclose(effective(BiasCorrected(base), weight), weight, rtol=0, atol=TOLERANCE)


def test_codes_values_and_steps_are_those_of_the_quantizer_below() -> None:
    weight = jnp.asarray(random_weight(1))
    quantizer = four_bits(np.asarray(weight))
    codes = quantizer.base.codes(weight)
    np.testing.assert_array_equal(quantizer.codes(weight), codes)
    np.testing.assert_array_equal(quantizer.values(codes), quantizer.base.values(codes))
    np.testing.assert_array_equal(quantizer.steps(weight), quantizer.base.steps(weight))
    changed = quantizer.with_scale(quantizer.scale * 2)
    assert isinstance(changed, BiasCorrected)
    np.testing.assert_array_equal(changed.scale, quantizer.scale * 2)
    np.testing.assert_array_equal(changed.base.zero_point, quantizer.base.zero_point)
