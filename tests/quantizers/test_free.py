"""What a search may move of a quantizer: placed back it is the same quantizer, and moved it keeps its form."""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from cptv_jax import InputError
from cptv_jax.quantizers import (
    LARGEST_EXPONENT,
    BiasCorrected,
    DualUniform,
    Focusing,
    FractionalUniform,
    Free,
    Log2,
    LogSqrt2,
    LowRank,
    OffsetUniform,
    Quantizer,
    RankSearch,
    ScaledQuantizer,
    Uniform,
    free_from_plain,
    free_to_plain,
    grid,
    move_candidate,
    name_of_quantizer,
    register_quantizer,
    unwrap,
)

SCALES = jnp.asarray([0.1, 0.03, 0.5], jnp.float32)


def uniform(zero_point: int, bits: int, signed: bool = False) -> Uniform:
    low, high = grid(bits, signed)
    return Uniform(SCALES, jnp.full(3, zero_point, jnp.float32), jnp.float32(low), jnp.float32(high))


@given(st.integers(2, 8).flatmap(lambda bits: st.tuples(st.just(bits), st.integers(0, 2**bits - 1))))
def test_a_zero_point_comes_back_as_the_same_code(case: tuple[int, int]) -> None:
    bits, zero_point = case
    for quantizer in (uniform(zero_point, bits), BiasCorrected(uniform(zero_point, bits))):
        again = quantizer.with_free(quantizer.free())
        jax.tree.map(np.testing.assert_array_equal, again, quantizer)


def test_a_zero_point_is_rounded_and_stays_a_code() -> None:
    moved = BiasCorrected(uniform(3, 4)).with_free(Free(zero_point=jnp.asarray([3.4, 15.7, -2.0]) / 15))
    np.testing.assert_array_equal(moved.base.zero_point, [3, 15, 0])

    def total(fraction: jax.Array) -> jax.Array:
        return jnp.sum(uniform(3, 4).with_free(Free(zero_point=fraction)).zero_point)

    np.testing.assert_array_equal(jax.grad(total)(jnp.asarray([3.4, 3.5, 3.6]) / 15), 15)


def test_a_zero_point_beyond_the_codes_stays_until_it_is_moved() -> None:
    beyond = replace(uniform(3, 4), zero_point=jnp.asarray([-5.0, 3.0, 22.0]))
    for quantizer in (beyond, BiasCorrected(beyond)):
        again = quantizer.with_free(quantizer.free())
        jax.tree.map(np.testing.assert_array_equal, again, quantizer)
    moved = beyond.with_free(Free(zero_point=(beyond.zero_point + jnp.asarray([2.0, -9.0, 9.0])) / 15))
    np.testing.assert_array_equal(moved.zero_point, [-3, 0, 22])


def test_one_scale_for_all_channels_keeps_their_powers_of_two() -> None:
    factors = np.asarray([1, 8, 2], np.float32)
    quantizer = uniform(3, 4).with_free(Free(jnp.float32(0.3) * factors))
    moved = quantizer.with_free(Free(jnp.float32(0.7)))
    np.testing.assert_array_equal(moved.scale, np.float32(0.7) * factors)


@given(st.lists(st.integers(0, 3), min_size=3, max_size=3), st.lists(st.floats(-0.5, 0.5), min_size=3, max_size=3))
def test_exponents_move_by_whole_octaves_within_their_range(octaves: list[int], moved: list[float]) -> None:
    given = replace(uniform(3, 4), scale=jnp.asarray(0.37 * 2.0 ** np.asarray(octaves), jnp.float32))
    free = given.free(powers_of_two=True)
    smallest, units = free.scale, free.exponents
    assert smallest == jnp.min(given.scale)
    again = given.with_free(free)
    jax.tree.map(np.testing.assert_array_equal, again, given)
    start = np.asarray(octaves) - min(octaves)
    step = np.asarray(moved, np.float32)
    expected = np.clip(np.round(start + step * 25), 0, LARGEST_EXPONENT)
    assume(np.all(np.abs((step * 25) % 1 - 0.5) > 1e-4))  # ties of float32 sums
    other = given.with_free(Free(smallest, exponents=units + jnp.asarray(step)))
    np.testing.assert_array_equal(other.scale, np.asarray(smallest) * 2 ** expected.astype(np.float32))


def test_the_derivative_by_an_exponent_is_that_of_an_unrounded_one() -> None:
    factors = jnp.asarray([1.0, 8.0, 2.0])

    def scales(units: jax.Array) -> jax.Array:
        free = Free(jnp.float32(1), exponents=units)
        return jnp.sum(replace(uniform(3, 4), scale=factors).with_free(free).scale)

    slope = jax.grad(scales)(jnp.asarray([0.3, 1.1, 1.4]) / 25)
    np.testing.assert_allclose(slope, 25 * np.log(2) * 2 ** np.asarray([0.3, 1.1, 1.4]), rtol=1e-5)  # float32 exp2


def test_a_focusing_interval_keeps_its_place_when_its_scale_grows() -> None:
    quantizer = Focusing(jnp.float32(0.01), jnp.float32(0.09), jnp.float32(15))
    assert float(quantizer.free().start) == pytest.approx(0.6)
    moved = quantizer.with_free(Free(jnp.float32(0.02), start=jnp.float32(0.6)))
    assert float(moved.start) == pytest.approx(0.18)
    assert float(moved.end) == pytest.approx(0.48)


def test_a_factor_is_offered_where_every_channel_has_its_own() -> None:
    quantizer = BiasCorrected(uniform(3, 4), jnp.asarray([1.0, 0.9, 1.1]))
    assert set(quantizer.free().names) == {"scale", "zero_point", "factor"}
    again = quantizer.with_free(Free(factor=jnp.asarray([2.0, 3.0, 4.0])))
    np.testing.assert_array_equal(again.factor, [2, 3, 4])
    np.testing.assert_array_equal(again.base.zero_point, quantizer.base.zero_point)
    one_for_all = BiasCorrected(uniform(3, 4))  # as older checkpoints have it
    assert set(one_for_all.free().names) == {"scale", "zero_point"}


def test_a_fractional_zero_point_is_not_offered() -> None:
    base = OffsetUniform(SCALES, jnp.full(3, 2.5), jnp.float32(0), jnp.float32(15))
    assert FractionalUniform(base).free().names == ("scale",)


def test_a_learned_rounding_is_offered_in_units_of_two_steps_where_there_is_one() -> None:
    rounding = jnp.asarray(np.linspace(-0.6, 0.6, 6).reshape(2, 3), jnp.float32)
    low_rank = LowRank(uniform(3, 4), jnp.ones((2, 1)), jnp.ones((1, 3)))
    for quantizer in (uniform(3, 4), BiasCorrected(uniform(3, 4)), low_rank):
        assert quantizer.free().rounding is None
        with_one = quantizer.with_rounding(rounding)
        np.testing.assert_allclose(with_one.free().rounding, rounding / 2, rtol=1e-6)
        moved = with_one.with_free(Free(rounding=jnp.full((2, 3), 0.2)))
        np.testing.assert_allclose(unwrap(moved).rounding, 0.4, rtol=1e-6)
        np.testing.assert_array_equal(unwrap(moved).zero_point, unwrap(quantizer).zero_point)


def test_a_weight_of_two_grids_has_no_learned_rounding() -> None:
    one = uniform(3, 4)
    dual = DualUniform(
        one.scale, one.zero_point, jnp.full(3, 2.0), one.zero_point, jnp.asarray([True, False]), one.low, one.high
    )
    assert dual.with_rounding(jnp.ones((2, 3))) is dual and dual.free().names == ("scale", "zero_point")


def test_a_step_multiplies_scales_and_factors_and_is_added_to_all_else() -> None:
    values = {name: jnp.asarray([2.0, 3.0]) for name in Free.__dataclass_fields__ if name != "own"}
    free = Free(**values, own={"down": jnp.ones(2)})
    steps = jax.tree.map(lambda leaf: jnp.full_like(leaf, 0.5), free)
    found = move_candidate({"a": free}, {"a": steps})["a"]
    for name in free.names[:-1]:
        expected = values[name] * jnp.exp(0.5) if name in ("scale", "factor") else values[name] + 0.5
        np.testing.assert_array_equal(getattr(found, name), expected, err_msg=name)
    assert found.own is not None
    np.testing.assert_array_equal(found.own["down"], 1.5)


def test_the_order_of_the_leaves_is_that_in_which_random_numbers_are_drawn() -> None:
    free = Free(*(jnp.float32(i) for i in range(7)))
    assert free.names == ("scale", "bias", "exponents", "factor", "rounding", "start", "zero_point")
    assert jax.tree.leaves({"b": free, "a": Free(zero_point=jnp.float32(9))}) == [9, *range(7)]


def test_a_tree_of_free_values_goes_through_plain_dictionaries() -> None:
    names = ("qkv.weight", "table.bias", "x.start", "own", "scale")  # sites may be called like fields
    tree = {"blocks.0": {name: Free(jnp.ones(2), zero_point=jnp.zeros(1)) for name in names}, "toy": {"x": jnp.ones(1)}}
    plain = free_to_plain(tree)
    assert not any(isinstance(leaf, Free) for leaf in jax.tree.leaves(plain, is_leaf=lambda x: isinstance(x, Free)))
    again = free_from_plain(plain)
    assert jax.tree.structure(again) == jax.tree.structure(tree)  # type: ignore[operator]
    jax.tree.map(np.testing.assert_array_equal, again, tree)


def test_what_a_low_rank_term_has_of_its_own_is_free_and_added_to() -> None:
    term = RankSearch(
        uniform(3, 4), jnp.ones((2, 2)), jnp.ones((2, 3)), jnp.asarray([1.0, 2.0]), jnp.zeros(2), jnp.float32(0)
    )
    free = term.free()
    assert free.own is not None and set(free.own) == {"down", "up", "preference"}
    moved = term.with_free(Free(own={"preference": jnp.asarray([1.0, 2.0])}))
    np.testing.assert_array_equal(moved.preference, [1, 2])
    np.testing.assert_array_equal(moved.down, term.down)


def test_levels_that_are_absolute_have_nothing_to_move() -> None:
    assert Log2(jnp.float32(15)).free() == Free()
    with pytest.raises(TypeError, match="no scale to search"):
        Log2(jnp.float32(15)).with_free(Free(jnp.float32(2)))
    assert LogSqrt2(jnp.float32(1), jnp.float32(15)).free().names == ("scale",)


def test_one_step_of_a_grid_in_the_units_of_free_values() -> None:
    units = uniform(3, 4).free_units()
    assert float(units.rounding) == 0.5 and float(units.zero_point) == pytest.approx(1 / 15)
    assert float(Focusing(jnp.float32(0.01), jnp.float32(0.09), jnp.float32(15)).free_units().start) == pytest.approx(
        1 / 15
    )


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Ternary(ScaledQuantizer):
    """-1, 0, 1: all that a user has to write."""

    scale: jax.Array

    def codes(self, values: jax.Array) -> jax.Array:
        return jnp.clip(jnp.round(values / self.scale), -1, 1)

    def values(self, codes: jax.Array) -> jax.Array:
        return codes * self.scale


def test_a_class_of_two_methods_is_a_quantizer_with_a_scale_to_move() -> None:
    quantizer = Ternary(jnp.float32(0.5))
    assert isinstance(quantizer, Quantizer)
    np.testing.assert_array_equal(quantizer.steps(jnp.asarray([-3.0, 0.1, 0.6])), [-1, 0, 1])
    assert quantizer.with_free(Free(jnp.float32(2))) == Ternary(jnp.float32(2))
    assert quantizer.with_rounding(jnp.ones((2, 2))) is quantizer
    slope = jax.grad(lambda x: jnp.sum(quantizer.steps(x)))(jnp.asarray([0.1, 0.6]))
    np.testing.assert_array_equal(slope, 2)  # one over the scale


def test_names_of_classes_are_given_once_and_to_quantizers_alone() -> None:
    assert name_of_quantizer(Ternary(jnp.float32(1))) is None
    assert name_of_quantizer(uniform(3, 4)) == "Uniform"
    with pytest.raises(InputError, match="there is a quantizer 'Uniform' already"):
        register_quantizer("Uniform", Ternary)
    with pytest.raises(InputError, match="Uniform is registered as 'Uniform' already"):
        register_quantizer("Other", Uniform)
    with pytest.raises(InputError, match=r"Free has no with_scale\(\); derive it from ScaledQuantizer"):
        register_quantizer("Free", Free)

    class Plain(ScaledQuantizer):
        pass

    with pytest.raises(InputError, match="Plain is not a registered dataclass"):
        register_quantizer("Plain", Plain)
