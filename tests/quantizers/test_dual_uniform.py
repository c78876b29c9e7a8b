"""Uniform quantizers of RepQ-ViT and ERQ: rounding before the zero point, and two grids in one weight."""

import jax.numpy as jnp
import numpy as np

from cptv_jax.quantizers import DualUniform, FractionalUniform, OffsetUniform, Uniform

GENERATOR = np.random.default_rng(0)
KERNEL = jnp.asarray(GENERATOR.normal(0, 1, (6, 4)), jnp.float32)
OUTLIERS = np.asarray([False, True, False, False, True, False])
SCALE, RATIO = np.asarray([0.1, 0.2, 0.15, 0.3], np.float32), np.asarray([2, 1.5, 3, 1.25], np.float32)
ZERO, OUTLIER_ZERO = np.asarray([7, 8, 6, 7], np.float32), np.asarray([8, 7, 9, 5], np.float32)
LOW, HIGH = jnp.float32(0), jnp.float32(15)
DUAL = DualUniform(
    jnp.asarray(SCALE),
    jnp.asarray(ZERO),
    jnp.asarray(RATIO),
    jnp.asarray(OUTLIER_ZERO),
    jnp.asarray(OUTLIERS),
    LOW,
    HIGH,
)


def test_rounding_comes_before_the_zero_point() -> None:
    arguments = (jnp.float32(1.0), jnp.float32(7.0), LOW, HIGH)
    ties = jnp.asarray([0.5, 1.5, -0.5])
    np.testing.assert_array_equal(OffsetUniform(*arguments).codes(ties), [7, 9, 7])
    np.testing.assert_array_equal(Uniform(*arguments).codes(ties), [8, 8, 6])


def test_a_fractional_zero_point_leaves_integer_steps_inside_the_range() -> None:
    quantizer = FractionalUniform(OffsetUniform(jnp.float32(0.5), jnp.float32(7.390625), LOW, HIGH))
    steps = quantizer.steps(jnp.asarray([-9.0, -1.2, 0.0, 0.26, 9.0]))
    np.testing.assert_array_equal(steps, [-7.390625, -2, 0, 1, 15 - 7.390625])


def test_other_roundings_give_the_neighbours_on_the_grid() -> None:
    quantizer = OffsetUniform(jnp.float32(0.5), jnp.float32(7.0), LOW, HIGH)
    x = jnp.asarray([-9.0, -0.3, 0.6, 1.0, 9.0])
    np.testing.assert_array_equal(quantizer.codes(x, jnp.floor), [0, 6, 8, 9, 15])
    np.testing.assert_array_equal(quantizer.codes(x, jnp.ceil), [0, 7, 9, 9, 15])


def test_each_input_is_quantized_on_its_own_grid() -> None:
    ordinary = OffsetUniform(jnp.asarray(SCALE), jnp.asarray(ZERO), LOW, HIGH)
    outlier = OffsetUniform(jnp.asarray(SCALE * RATIO), jnp.asarray(OUTLIER_ZERO), LOW, HIGH)
    for rounding in (jnp.round, jnp.floor, jnp.ceil):
        codes = DUAL.codes(KERNEL, rounding)
        np.testing.assert_array_equal(codes[~OUTLIERS], ordinary.codes(KERNEL[~OUTLIERS], rounding))
        np.testing.assert_array_equal(codes[OUTLIERS], outlier.codes(KERNEL[OUTLIERS], rounding))
    codes = DUAL.codes(KERNEL)
    np.testing.assert_array_equal(DUAL.values(codes)[OUTLIERS], outlier.values(codes[OUTLIERS]))
    np.testing.assert_array_equal(DUAL.values(codes)[~OUTLIERS], ordinary.values(codes[~OUTLIERS]))


def test_steps_are_in_units_of_the_scale_that_a_matmul_applies() -> None:
    # Of the outliers' grid the product is associated differently: one rounding.
    np.testing.assert_allclose(DUAL.steps(KERNEL) * SCALE, DUAL.values(DUAL.codes(KERNEL)), rtol=2e-7)


def test_a_searched_scale_moves_both_grids_by_one_factor_wherever_the_search_came_from() -> None:
    wide = DUAL.with_scale(jnp.asarray(4 * SCALE))
    np.testing.assert_array_equal(wide.outlier_scale, 4 * SCALE * RATIO)
    np.testing.assert_array_equal(wide.codes(4 * KERNEL), DUAL.codes(KERNEL))
    np.testing.assert_array_equal(wide.with_scale(DUAL.scale).outlier_scale, DUAL.outlier_scale)
