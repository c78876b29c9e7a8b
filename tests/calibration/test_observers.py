"""Calibration statistics and the parameters that follow from them, against NumPy."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cptv_jax.calibration import observers
from cptv_jax.calibration.observers import STATISTICS, Range
from cptv_jax.quantizers import BiasCorrected, Log2, Uniform
from cptv_jax.recipe.spec import SiteSpec

EPS = np.finfo(np.float32).eps
Extreme = np.ndarray | np.float64  # of each channel, or of the tensor


def three_batches(shape: tuple[int, ...] = (5, 7, 8)) -> list[np.ndarray]:
    """Batches that each widen some channel's range."""
    rng = np.random.default_rng(0)
    return [(rng.normal(size=shape) * rng.uniform(0.5, 3, shape[-1])).astype(np.float32) for _ in range(3)]


def run(spec: SiteSpec, batches: list[np.ndarray]) -> Range:
    found = None
    for batch in batches:
        found = observers.update(spec, found, jnp.asarray(batch))
    assert found is not None
    return found


def fit(spec: SiteSpec, batches: list[np.ndarray]) -> Uniform:
    quantizer = observers.fit(spec, run(spec, batches), jnp.asarray(batches[-1]))
    assert isinstance(quantizer, Uniform)
    return quantizer


def extremes(x: np.ndarray, per_channel: bool) -> tuple[np.ndarray, np.ndarray]:
    axes = tuple(range(x.ndim - 1)) if per_channel else None
    return x.min(axes), x.max(axes)


# Running ranges


@pytest.mark.parametrize("observer", ["minmax", "omse", "ptf"])
@pytest.mark.parametrize("per_channel", [False, True])
def test_the_range_is_that_of_all_batches(observer: str, per_channel: bool) -> None:
    batches = three_batches()
    found = run(SiteSpec(observer=observer, per_channel=per_channel), batches)
    minimum, maximum = extremes(np.concatenate(batches), per_channel)
    np.testing.assert_array_equal(found.minimum, minimum)
    np.testing.assert_array_equal(found.maximum, maximum)
    assert found.minimum.shape == ((8,) if per_channel else ())


@pytest.mark.parametrize("per_channel", [False, True])
def test_a_moving_range_starts_at_the_first_batch_and_moves_by_a_hundredth(per_channel: bool) -> None:
    batches = three_batches()
    found = run(SiteSpec(observer="ema", per_channel=per_channel), batches)
    minimum, maximum = (np.asarray(a, np.float64) for a in extremes(batches[0], per_channel))
    for batch in batches[1:]:
        low, high = extremes(batch, per_channel)
        minimum, maximum = minimum + 0.01 * (low - minimum), maximum + 0.01 * (high - maximum)
    # A few float32 roundings; the second batch alone moves the range a thousand times as far.
    np.testing.assert_allclose(found.minimum, minimum, rtol=5e-7)
    np.testing.assert_allclose(found.maximum, maximum, rtol=5e-7)


def test_percentiles_interpolate_and_move() -> None:
    # One far outlier on each side of 280 values: the quantile lies 0.28% of the gap inside the extreme.
    rng = np.random.default_rng(1)
    batches = [rng.uniform(-1, 1, (5, 7, 8)).astype(np.float32) for _ in range(3)]
    for batch, outlier in zip(batches, (100, 150, 60), strict=True):
        batch[0, 0, 0], batch[1, 1, 1] = outlier, -2 * outlier
    found = run(SiteSpec(observer="percentile"), batches)
    quantiles = [np.quantile(np.float64(batch), [1 - 0.99999, 0.99999]) for batch in batches]
    expected = quantiles[0]
    for quantile in quantiles[1:]:
        expected = expected + 0.01 * (quantile - expected)
    # float32 holds 0.99999 to 6e-8, that is the position among 280 values to 2e-5, of a gap of up to 300.
    np.testing.assert_allclose([found.minimum, found.maximum], expected, atol=1e-2)
    assert abs(float(found.maximum) - 100) > 0.1  # neither the extreme nor without the second batch


# From a range to parameters


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("per_channel", [False, True])
def test_an_asymmetric_grid_spreads_over_the_range(bits: int, per_channel: bool) -> None:
    batches = three_batches()
    quantizer = fit(SiteSpec(bits=bits, per_channel=per_channel), batches)
    minimum, maximum = extremes(np.concatenate(batches), per_channel)
    scale = (maximum - minimum) / np.float32(2**bits - 1)  # bit for bit: float32, one division
    np.testing.assert_array_equal(quantizer.scale, scale)
    np.testing.assert_array_equal(quantizer.zero_point, np.clip(-np.rint(minimum / scale), 0, 2**bits - 1))
    assert (quantizer.low, quantizer.high) == (0, 2**bits - 1)


@pytest.mark.parametrize("bits", [3, 8])
def test_a_symmetric_signed_grid_mirrors_the_larger_end(bits: int) -> None:
    batches = three_batches((9, 8))
    quantizer = fit(SiteSpec(bits=bits, signed=True, symmetric=True, per_channel=True), batches)
    largest = np.abs(np.concatenate(batches)).max(0)
    half = {3: 3.5, 8: 127.5}[bits]
    np.testing.assert_array_equal(quantizer.scale, largest / np.float32(half))
    np.testing.assert_array_equal(quantizer.zero_point, np.zeros(8))
    assert (quantizer.low, quantizer.high) == {3: (-4, 3), 8: (-128, 127)}[bits]


def test_a_signed_asymmetric_grid_has_a_zero_point() -> None:
    quantizer = fit(SiteSpec(bits=4, signed=True), [np.asarray([[-1.0, 14.0]], np.float32)])
    assert (quantizer.low, quantizer.high) == (-8, 7)
    assert quantizer.scale == 1.0
    assert quantizer.zero_point == -7.0  # the code of 0: low is the code of -1


def test_the_zero_point_stays_on_the_grid_when_zero_is_outside_the_range() -> None:
    spec = SiteSpec(bits=4)
    assert fit(spec, [np.asarray([[2.0, 5.0]], np.float32)]).zero_point == 0.0
    assert fit(spec, [np.asarray([[-5.0, -2.0]], np.float32)]).zero_point == 15.0


@pytest.mark.parametrize("observer", STATISTICS)
@pytest.mark.parametrize("value", [0.0, 3.5, -2.0])
@pytest.mark.parametrize("symmetric", [False, True])
def test_a_constant_tensor_gives_a_scale_that_can_be_divided_by(observer: str, value: float, symmetric: bool) -> None:
    spec = SiteSpec(observer=observer, per_channel=observer == "ptf", symmetric=symmetric, signed=symmetric)
    x = np.full((3, 4), value, np.float32)
    quantizer = fit(spec, [x, x])
    # The power-of-two factor divides the guarded scale by up to 8.
    assert (np.asarray(quantizer.scale) >= (EPS / 8 if observer == "ptf" else EPS)).all()
    codes = quantizer.codes(jnp.asarray(x))
    for array in (quantizer.scale, quantizer.zero_point, codes, quantizer.values(codes)):
        assert np.isfinite(array).all()


# OMSE


def brute_force_omse(
    x: np.ndarray, minimum: Extreme, maximum: Extreme, bits: int, signed: bool, symmetric: bool
) -> tuple[int, np.ndarray]:
    """Index of the best of the 90 factors, and all scores, in float64."""
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    exact, scores = np.float64(x), []
    for i in range(90):
        smallest, largest = minimum * (1 - 0.01 * i), maximum * (1 - 0.01 * i)
        if symmetric:
            scale, zero_point = np.maximum(-smallest, largest) / ((high - low) / 2), np.zeros_like(largest)
        else:
            scale = (largest - smallest) / (high - low)
            zero_point = np.clip(low - np.rint(smallest / scale), low, high)
        codes = np.clip(np.rint(exact / scale + zero_point), low, high)
        scores.append(np.mean(((codes - zero_point) * scale - exact) ** 2))
    return int(np.argmin(scores)), np.asarray(scores)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("signed, symmetric", [(False, False), (True, True)])
def test_omse_picks_the_factor_that_brute_force_picks(
    bits: int, per_channel: bool, signed: bool, symmetric: bool
) -> None:
    rng = np.random.default_rng(bits)
    x = (rng.standard_t(3, (40, 8)) * rng.uniform(0.5, 2, 8)).astype(np.float32)  # heavy tails: shrinking pays
    minimum, maximum = (np.asarray(a, np.float64) for a in extremes(x, per_channel))
    best, scores = brute_force_omse(x, minimum, maximum, bits, signed, symmetric)
    assert bits == 8 or best > 3
    assert np.sort(scores)[1] > scores[best] * (1 + 1e-5)  # float32 scores cannot change the order
    spec = SiteSpec(bits=bits, signed=signed, symmetric=symmetric, per_channel=per_channel, observer="omse")
    quantizer = fit(spec, [x])
    largest = np.maximum(-minimum, maximum) * 2 if symmetric else maximum - minimum
    # One factor for all channels; neighbouring factors differ by more than 1%.
    np.testing.assert_allclose(quantizer.scale, (1 - 0.01 * best) * largest / (2**bits - 1), rtol=1e-6)


def test_omse_takes_its_range_from_all_batches_and_its_scores_from_the_last() -> None:
    wide = np.linspace(-8, 9, 400, dtype=np.float32).reshape(50, 8)
    narrow = np.random.default_rng(2).normal(size=(50, 8)).astype(np.float32)
    best, _ = brute_force_omse(narrow, np.float64(-8), np.float64(9), 4, False, False)
    quantizer = fit(SiteSpec(bits=4, observer="omse"), [wide, narrow])
    np.testing.assert_allclose(quantizer.scale, (1 - 0.01 * best) * 17 / 15, rtol=1e-6)
    other, _ = brute_force_omse(wide, np.float64(-8), np.float64(9), 4, False, False)
    assert abs(best - other) > 10  # scoring on the first batch would show


def test_the_first_of_equally_good_factors_wins() -> None:
    spec = SiteSpec(bits=8, observer="omse")
    zeros = jnp.zeros((4, 8))  # every factor represents zero exactly
    quantizer = observers.fit(spec, Range(jnp.float32(0.0), jnp.float32(255.0)), zeros)
    assert quantizer.scale == 1.0


# The power-of-two factor


def brute_force_ptf(x: np.ndarray, minimum: float, maximum: float, bits: int) -> tuple[np.ndarray, float, float]:
    """k for each channel, the coarsest scale and the zero point, in float64."""
    top = 2**bits - 1
    coarsest = (maximum - minimum) / top
    zero_point = np.clip(-np.rint(minimum / coarsest), 0, top)
    exact, errors = np.float64(x), []
    for k in range(4):
        scale = coarsest / 8 * 2**k
        codes = np.clip(np.rint(exact / scale + zero_point), 0, top)
        errors.append(((codes - zero_point) * scale - exact) ** 2)
    return np.argmin(np.stack([e.reshape(-1, x.shape[-1]).mean(0) for e in errors]), 0), coarsest, zero_point


@pytest.mark.parametrize("bits", [4, 8])
def test_the_power_of_two_factor_of_each_channel_is_that_of_brute_force(bits: int) -> None:
    rng = np.random.default_rng(3)
    sizes = np.array([0.05, 0.1, 0.12, 0.2, 0.25, 0.45, 0.5, 1.0])
    first, last = ((rng.uniform(-1, 1.3, (6, 5, 8)) * sizes).astype(np.float32) for _ in range(2))
    first[0, 0, 7] = 1.5  # the range comes from every batch
    both = np.concatenate([first, last])
    k, coarsest, zero_point = brute_force_ptf(last, float(both.min()), float(both.max()), bits)
    assert set(k) == {0, 1, 2, 3}
    quantizer = fit(SiteSpec(bits=bits, per_channel=True, observer="ptf"), [first, last])
    np.testing.assert_allclose(quantizer.scale, coarsest / 8 * 2.0**k, rtol=3e-7)
    # Exact powers of two: the integer LayerNorm reads the ratios as integers.
    scale = np.asarray(quantizer.scale)
    np.testing.assert_array_equal(scale / scale.min(), 2.0 ** (k - k.min()))
    assert quantizer.zero_point.shape == () and quantizer.zero_point == zero_point


def test_the_smallest_of_equally_good_factors_wins() -> None:
    x = np.zeros((4, 8), np.float32)
    x[:, 7] = [0, 255, 128, 7]  # the other channels are exact with every factor
    quantizer = fit(SiteSpec(bits=8, per_channel=True, observer="ptf"), [x])
    np.testing.assert_array_equal(quantizer.scale, [*[1 / 8] * 7, 1.0])


# What is fitted


@settings(deadline=None, max_examples=20)
@given(bits=st.integers(2, 8))
def test_a_log2_site_has_as_many_powers_as_its_bits_say(bits: int) -> None:
    quantizer = observers.fit(SiteSpec("log2", bits), Range(jnp.float32(0), jnp.float32(1)), jnp.ones((2, 2)))
    assert isinstance(quantizer, Log2) and quantizer.high == 2**bits - 1


@pytest.mark.parametrize("observer", ["minmax", "omse"])
def test_bias_correction_wraps_what_the_observer_found(observer: str) -> None:
    batches = three_batches((9, 8))
    spec = SiteSpec(bits=4, per_channel=True, observer=observer, bias_correction=True)
    found = run(spec, batches)
    corrected = observers.fit(spec, found, jnp.asarray(batches[-1]))
    assert isinstance(corrected, BiasCorrected)
    plain = fit(SiteSpec(bits=4, per_channel=True, observer=observer), batches)
    np.testing.assert_array_equal(corrected.scale, plain.scale)
    np.testing.assert_array_equal(corrected.base.zero_point, plain.zero_point)
