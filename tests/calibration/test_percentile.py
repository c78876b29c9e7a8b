"""Percentile search against NumPy, and what becomes of tensors without extent."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cptv_jax.calibration.percentile import PERCENTILES, fit, fit_weight, outlier_inputs, quantiles
from cptv_jax.quantizers import DualUniform, LogSqrt2, OffsetUniform
from cptv_jax.recipe.spec import SiteSpec

TENSOR, CHANNELS = SiteSpec(bits=4, observer="method"), SiteSpec(bits=4, per_channel=True, observer="method")
LOG, DUAL = (
    SiteSpec("log-sqrt2", 4, observer="method"),
    SiteSpec("dual-uniform", 4, per_channel=True, observer="method"),
)
GENERATOR = np.random.default_rng(0)


def best_range(x: np.ndarray, bits: int, percentiles: Sequence[float]) -> tuple[float, float]:
    """Scale and zero point by the definition, in float64."""
    best = (np.inf, 0.0, 0.0)
    for percentile in percentiles:
        low, high = np.quantile(x, 1 - percentile), np.quantile(x, percentile)
        scale = (high - low) / (2**bits - 1)
        zero_point = np.round(-low / scale)
        codes = np.clip(np.round(x / scale) + zero_point, 0, 2**bits - 1)
        best = min(best, (float(np.mean(((codes - zero_point) * scale - x) ** 2)), scale, zero_point))
    return best[1:]


@pytest.mark.parametrize("count", [2, 17, 5000, 104448])
def testquantiles_are_interpolated_between_the_outermost_values(count: int) -> None:
    x = GENERATOR.normal(size=(2, count)).astype(np.float32)
    found = jax.jit(lambda x: quantiles(x, PERCENTILES))(x)
    # The rank is a float32, as torch has it: of 104,448 values it is exact to 1/128, of the gaps between the largest.
    np.testing.assert_allclose(found, np.quantile(x, PERCENTILES, axis=1), atol=0.01 if count > 9999 else 1e-3)
    low = [1 - percentile for percentile in PERCENTILES]
    found = jax.jit(lambda x: quantiles(x, low))(x)
    np.testing.assert_allclose(found, np.quantile(x, low, axis=1), atol=1e-3)


@pytest.mark.parametrize("heavy", [False, True])
def test_the_range_with_the_least_squared_error_wins(heavy: bool) -> None:
    x = (GENERATOR.standard_t(3, (400, 30)) if heavy else GENERATOR.normal(1, 1, (400, 30))).astype(np.float32)
    found = fit(TENSOR, jnp.asarray(x))
    assert isinstance(found, OffsetUniform) and found.scale.shape == ()
    scale, zero_point = best_range(x, 4, PERCENTILES)
    np.testing.assert_allclose(found.scale, scale, rtol=1e-3)
    assert found.zero_point == zero_point
    channels = fit(CHANNELS, jnp.asarray(x))
    assert isinstance(channels, OffsetUniform)
    for channel in range(30):
        scale, zero_point = best_range(x[:, channel], 4, PERCENTILES)
        np.testing.assert_allclose(channels.scale[channel], scale, rtol=1e-3)
        assert channels.zero_point[channel] == zero_point


def test_outliers_are_clipped_where_that_costs_less() -> None:
    x = np.concatenate([GENERATOR.normal(size=20000), [40.0]]).astype(np.float32)
    narrow = float(fit(TENSOR, jnp.asarray(x)).scale)
    assert narrow < 10 / 15  # the whole range would be 44 / 15


@pytest.mark.parametrize("value", [0.0, 1.5, -2.25, 1e-30])
def test_a_constant_channel_is_represented_exactly(value: float) -> None:
    x = GENERATOR.normal(size=(50, 3)).astype(np.float32)
    x[:, 1] = value
    found = fit(CHANNELS, jnp.asarray(x))
    assert np.isfinite(found.scale).all() and (np.asarray(found.scale) > 0).all()
    smallest = float(jnp.finfo(jnp.float32).eps)
    np.testing.assert_allclose(found.scale[1], max(abs(value) / 15, smallest), rtol=1e-6)
    np.testing.assert_allclose(found.values(found.codes(jnp.asarray(x)))[:, 1], x[:, 1], rtol=1e-6, atol=smallest)
    others = fit(CHANNELS, jnp.asarray(x[:, [0, 2]]))
    np.testing.assert_array_equal(found.scale[np.asarray([0, 2])], others.scale)


def test_a_channel_with_a_single_spike_falls_back_to_its_whole_range() -> None:
    x = np.zeros((100_000, 1), np.float32)
    x[7] = 3.0
    found = fit(CHANNELS, jnp.asarray(x))
    np.testing.assert_allclose(found.scale, [3.0 / 15], rtol=1e-6)
    np.testing.assert_allclose(found.values(found.codes(jnp.asarray(x))).max(), 3.0, rtol=1e-6)


def test_log_sqrt2_scale_is_the_percentile_with_the_least_squared_error() -> None:
    x = GENERATOR.dirichlet(np.full(20, 0.3), 500).astype(np.float32)
    found = fit(LOG, jnp.asarray(x))
    assert isinstance(found, LogSqrt2)

    def error(scale: float) -> float:
        codes = np.round(-2 * np.log2(np.maximum(x, 1e-30) / scale))
        return float(np.mean((np.where(codes > 15, 0, scale * 2 ** (-np.clip(codes, 0, 15) / 2)) - x) ** 2))

    scales = [float(np.quantile(x, percentile)) for percentile in PERCENTILES]
    np.testing.assert_allclose(found.scale, min(scales, key=error), rtol=1e-4)
    assert np.isfinite(fit(LOG, jnp.zeros((3, 5))).scale)


def published_outliers(weight: np.ndarray) -> list[int]:
    """The same by counting: weight [outputs, inputs] (golden README, fact 26)."""
    counts: dict[int, int] = {}
    for row in weight:
        above = np.percentile(row[row > 0], 99) if (row > 0).any() else np.inf
        below = np.percentile(row[row < 0], 1) if (row < 0).any() else -np.inf
        for index in np.flatnonzero((row > above) | (row < below)):
            counts[int(index)] = counts.get(int(index), 0) + 1
    ranked = sorted(counts, key=lambda index: -counts[index])  # stable: ties keep the order in which they came
    return sorted(ranked[: len(weight) // 20])


@pytest.mark.parametrize(("inputs", "outputs"), [(64, 192), (24, 60), (301, 100), (8, 19), (5, 400)])
def test_outlier_inputs_are_the_most_frequent_ones(inputs: int, outputs: int) -> None:
    kernel = GENERATOR.normal(size=(inputs, outputs)).astype(np.float32)
    kernel[GENERATOR.integers(inputs, size=3)] *= 5
    kernel[:, 0] = np.abs(kernel[:, 0])
    assert np.flatnonzero(outlier_inputs(jnp.asarray(kernel))).tolist() == published_outliers(kernel.T)


def test_a_dual_uniform_weight_has_the_grid_of_each_part() -> None:
    values = GENERATOR.normal(size=(40, 60)).astype(np.float32)
    values[[3, 17, 20]] *= 6
    kernel = jnp.asarray(values)
    found = fit_weight(DUAL, kernel)
    assert isinstance(found, DualUniform)
    assert np.flatnonzero(found.is_outlier).tolist() == [3, 17, 20]
    single = fit_weight(CHANNELS, kernel)
    assert np.mean((found.values(found.codes(kernel)) - kernel) ** 2) < np.mean(
        (single.values(single.codes(kernel)) - kernel) ** 2
    )
    np.testing.assert_allclose(
        found.outlier_scale, fit_weight(CHANNELS, jnp.asarray(values[[3, 17, 20]])).scale, rtol=2e-7
    )


@pytest.mark.parametrize("shape", [(6, 19), (2, 400)])
def test_a_weight_without_outliers_or_without_other_inputs_has_one_grid(shape: tuple[int, int]) -> None:
    kernel = jnp.asarray(GENERATOR.normal(size=shape), jnp.float32)
    found, single = fit_weight(DUAL, kernel), fit_weight(CHANNELS, kernel)
    assert isinstance(found, DualUniform)
    if not np.asarray(found.is_outlier).any():
        np.testing.assert_array_equal(found.codes(kernel), single.codes(kernel))
    assert np.isfinite(found.values(found.codes(kernel))).all()
