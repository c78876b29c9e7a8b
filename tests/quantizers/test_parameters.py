"""What a search may change of a quantizer: placed back it is the same quantizer, and moved it keeps its form."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from cptv_jax.quantizers import (
    LARGEST_EXPONENT,
    BiasCorrected,
    DualUniform,
    Focusing,
    FractionalUniform,
    LowRank,
    OffsetUniform,
    Uniform,
    exponents,
    grid,
    innermost,
    offsets,
    with_parameters,
    with_rounding,
    with_zero_point,
)

SCALES = jnp.asarray([0.1, 0.03, 0.5], jnp.float32)


def uniform(zero_point: int, bits: int, signed: bool = False) -> Uniform:
    low, high = grid(bits, signed)
    return Uniform(SCALES, jnp.full(3, zero_point, jnp.float32), jnp.float32(low), jnp.float32(high))


@given(st.integers(2, 8).flatmap(lambda bits: st.tuples(st.just(bits), st.integers(0, 2**bits - 1))))
def test_a_zero_point_comes_back_as_the_same_code(case: tuple[int, int]) -> None:
    bits, zero_point = case
    for quantizer in (uniform(zero_point, bits), BiasCorrected(uniform(zero_point, bits))):
        again = with_parameters(quantizer, {"scale": SCALES, **offsets(quantizer)})
        jax.tree.map(np.testing.assert_array_equal, again, quantizer)


def test_a_zero_point_is_rounded_and_stays_a_code() -> None:
    moved = with_zero_point(BiasCorrected(uniform(3, 4)), jnp.asarray([3.4, 15.7, -2.0]))
    np.testing.assert_array_equal(moved.base.zero_point, [3, 15, 0])
    slope = jax.grad(lambda z: jnp.sum(with_zero_point(uniform(3, 4), z).zero_point))(jnp.asarray([3.4, 3.5, 3.6]))
    np.testing.assert_array_equal(slope, 1)


def test_a_zero_point_beyond_the_codes_stays_until_it_is_moved() -> None:
    beyond = replace(uniform(3, 4), zero_point=jnp.asarray([-5.0, 3.0, 22.0]))
    for quantizer in (beyond, BiasCorrected(beyond)):
        again = with_parameters(quantizer, {"scale": SCALES, **offsets(quantizer)})
        jax.tree.map(np.testing.assert_array_equal, again, quantizer)
    moved = with_zero_point(beyond, beyond.zero_point + jnp.asarray([2.0, -9.0, 9.0]))
    np.testing.assert_array_equal(moved.zero_point, [-3, 0, 22])


def test_one_scale_for_all_channels_keeps_their_powers_of_two() -> None:
    factors = np.float32([1, 8, 2])
    quantizer = with_parameters(uniform(3, 4), {"scale": jnp.float32(0.3) * factors})
    moved = with_parameters(quantizer, {"scale": jnp.float32(0.7)})
    np.testing.assert_array_equal(moved.scale, np.float32(0.7) * factors)


@given(st.lists(st.integers(0, 3), min_size=3, max_size=3), st.lists(st.floats(-0.5, 0.5), min_size=3, max_size=3))
def test_exponents_move_by_whole_octaves_within_their_range(octaves: list[int], moved: list[float]) -> None:
    given = replace(uniform(3, 4), scale=jnp.asarray(0.37 * 2.0 ** np.asarray(octaves), jnp.float32))
    smallest, units = jnp.min(given.scale), exponents(given)
    again = with_parameters(given, {"scale": smallest, "exponents": units})
    jax.tree.map(np.testing.assert_array_equal, again, given)
    start = np.asarray(octaves) - min(octaves)
    expected = np.clip(np.round(start + np.float32(moved) * 25), 0, LARGEST_EXPONENT)
    assume(np.all(np.abs((np.float32(moved) * 25) % 1 - 0.5) > 1e-4))  # ties of float32 sums
    other = with_parameters(given, {"scale": smallest, "exponents": units + jnp.asarray(moved, jnp.float32)})
    np.testing.assert_array_equal(other.scale, np.float32(smallest) * 2 ** np.float32(expected))


def test_the_derivative_by_an_exponent_is_that_of_an_unrounded_one() -> None:
    factors = jnp.asarray([1.0, 8.0, 2.0])

    def scales(units: jax.Array) -> jax.Array:
        return jnp.sum(with_parameters(replace(uniform(3, 4), scale=factors), {"scale": 1.0, "exponents": units}).scale)

    slope = jax.grad(scales)(jnp.asarray([0.3, 1.1, 1.4]) / 25)
    np.testing.assert_allclose(slope, 25 * np.log(2) * 2 ** np.asarray([0.3, 1.1, 1.4]), rtol=1e-5)  # float32 exp2


def test_a_focusing_interval_keeps_its_place_when_its_scale_grows() -> None:
    quantizer = Focusing(jnp.float32(0.01), jnp.float32(0.09), jnp.float32(15))
    assert float(offsets(quantizer)["start"]) == pytest.approx(0.6)
    moved = with_parameters(quantizer, {"scale": jnp.float32(0.02), "start": jnp.float32(0.6)})
    assert float(moved.start) == pytest.approx(0.18)
    assert float(moved.end) == pytest.approx(0.48)


def test_a_factor_is_offered_where_every_channel_has_its_own() -> None:
    quantizer = BiasCorrected(uniform(3, 4), jnp.asarray([1.0, 0.9, 1.1]))
    assert set(offsets(quantizer)) == {"zero_point", "factor"}
    again = with_parameters(quantizer, {"factor": jnp.asarray([2.0, 3.0, 4.0])})
    np.testing.assert_array_equal(again.factor, [2, 3, 4])
    np.testing.assert_array_equal(again.base.zero_point, quantizer.base.zero_point)
    assert set(offsets(BiasCorrected(uniform(3, 4)))) == {"zero_point"}  # as older checkpoints have it: one for all


def test_a_fractional_zero_point_is_not_offered() -> None:
    base = OffsetUniform(SCALES, jnp.full(3, 2.5), jnp.float32(0), jnp.float32(15))
    assert offsets(FractionalUniform(base)) == {}


def test_a_learned_rounding_is_offered_in_units_of_two_steps_where_there_is_one() -> None:
    rounding = jnp.asarray(np.linspace(-0.6, 0.6, 6).reshape(2, 3), jnp.float32)
    low_rank = LowRank(uniform(3, 4), jnp.ones((2, 1)), jnp.ones((1, 3)))
    for quantizer in (uniform(3, 4), BiasCorrected(uniform(3, 4)), low_rank):
        assert "rounding" not in offsets(quantizer)
        with_one = with_rounding(quantizer, rounding)
        np.testing.assert_allclose(offsets(with_one)["rounding"], rounding / 2, rtol=1e-6)
        moved = with_parameters(with_one, {"rounding": jnp.full((2, 3), 0.2)})
        np.testing.assert_allclose(innermost(moved).rounding, 0.4, rtol=1e-6)
        np.testing.assert_array_equal(innermost(moved).zero_point, innermost(quantizer).zero_point)


def test_a_weight_of_two_grids_has_no_learned_rounding() -> None:
    one = uniform(3, 4)
    dual = DualUniform(
        one.scale, one.zero_point, jnp.full(3, 2.0), one.zero_point, jnp.asarray([True, False]), one.low, one.high
    )
    assert with_rounding(dual, jnp.ones((2, 3))) is dual
