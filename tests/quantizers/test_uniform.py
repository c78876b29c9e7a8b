"""The uniform quantizer is the published formula, bit for bit, in every way that it is run."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import ArrayLike

from cptv_jax.quantizers import OffsetUniform, Uniform, grid

CHANNELS = 8
SCALES = st.floats(2.0**-20, 2.0**10, width=32)


def make(scale: ArrayLike, zero_point: float, bits: int, signed: bool = False) -> Uniform:
    low, high = grid(bits, signed)
    return Uniform(*(jnp.asarray(value, jnp.float32) for value in (scale, zero_point, low, high)))


def expected_codes(x: np.ndarray, quantizer: Uniform) -> np.ndarray:
    """clamp(round(x / scale + zero point)) in NumPy's float32; np.rint rounds half to even."""
    scale, zero_point, low, high = (
        np.asarray(a) for a in (quantizer.scale, quantizer.zero_point, quantizer.low, quantizer.high)
    )
    assert x.dtype == scale.dtype == zero_point.dtype == np.float32
    return np.clip(np.rint(x / scale + zero_point), low, high)


def codes(quantizer: Uniform, x: jax.Array) -> jax.Array:
    return quantizer.codes(x)


COMPILED_CODES = jax.jit(codes)


@st.composite
def quantizers(draw: st.DrawFn) -> Uniform:
    """Per tensor or per channel, signed or not, 2 to 8 bits, zero point anywhere on the grid."""
    bits, signed = draw(st.integers(2, 8)), draw(st.booleans())
    low, high = grid(bits, signed)
    zero_point = float(draw(st.integers(int(low), int(high))))
    scale = draw(arrays(np.float32, CHANNELS, elements=SCALES) | SCALES.map(np.float32))
    return make(scale, zero_point, bits, signed)


def values_near_ties(quantizer: Uniform, seed: int) -> np.ndarray:
    """Half of them at, or one rounding beside, a multiple of half a step; the others anywhere, also past the range."""
    rng = np.random.default_rng(seed)
    half_steps = rng.integers(-600, 600, (32, CHANNELS)) / np.float32(2)
    anywhere = rng.uniform(-300, 300, (32, CHANNELS)).astype(np.float32)
    return np.concatenate([half_steps, anywhere]).astype(np.float32) * np.asarray(quantizer.scale)


@settings(deadline=None, max_examples=100)
@given(quantizer=quantizers(), seed=st.integers(0, 2**32 - 1))
def test_codes_are_the_formula_bit_for_bit(quantizer: Uniform, seed: int) -> None:
    x = values_near_ties(quantizer, seed)
    expected = expected_codes(x, quantizer)
    np.testing.assert_array_equal(COMPILED_CODES(quantizer, x), expected)
    np.testing.assert_array_equal(quantizer.codes(jnp.asarray(x)), expected)


def test_a_tie_is_rounded_to_even_after_the_zero_point_is_added() -> None:
    x = np.array([-1.5, -0.5, 0.5, 1.5, 2.5], np.float32)
    # Rounding first would give -2, 0, 0, 2, 2, plus an odd zero point: 1, 3, 3, 5, 5.
    np.testing.assert_array_equal(make(1.0, 3.0, 8).codes(jnp.asarray(x)), [2, 2, 4, 4, 6])
    np.testing.assert_array_equal(make(1.0, 4.0, 8).codes(jnp.asarray(x)), [2, 4, 4, 6, 6])


def test_pixels_at_the_ends_of_the_range_fall_as_in_the_published_code() -> None:
    # Fact 5 of the golden README: pixels of exactly -1 and 1 with scale 2/255 lie beside a tie.
    quantizer = make(np.float32(2) / np.float32(255), 127.0, 8)
    x = np.array([-1.0, 1.0], np.float32)
    np.testing.assert_array_equal(COMPILED_CODES(quantizer, x), expected_codes(x, quantizer))


@pytest.mark.parametrize("shape", [(5,), (5, CHANNELS)])
def test_a_population_of_scales_quantizes_as_each_scale_alone(shape: tuple[int, ...]) -> None:
    scales = np.random.default_rng(0).uniform(0.01, 0.05, shape).astype(np.float32)
    quantizer = make(scales[0], 7.0, 4)
    x = values_near_ties(quantizer, 0)
    found = jax.jit(jax.vmap(lambda scale: quantizer.with_scale(scale).codes(jnp.asarray(x))))(scales)
    for one, scale in zip(found, scales, strict=True):
        np.testing.assert_array_equal(one, expected_codes(x, make(scale, 7.0, 4)))


@settings(deadline=None, max_examples=50)
@given(quantizer=quantizers(), seed=st.integers(0, 2**32 - 1))
def test_quantizing_twice_changes_nothing(quantizer: Uniform, seed: int) -> None:
    once = quantizer.codes(jnp.asarray(values_near_ties(quantizer, seed)))
    np.testing.assert_array_equal(quantizer.codes(quantizer.values(once)), once)


@settings(deadline=None, max_examples=50)
@given(quantizer=quantizers(), seed=st.integers(0, 2**32 - 1))
def test_a_value_in_the_range_moves_by_half_a_step_at_most_and_others_to_the_nearest_end(
    quantizer: Uniform, seed: int
) -> None:
    x = values_near_ties(quantizer, seed)
    found = np.asarray(quantizer.values(quantizer.codes(jnp.asarray(x))), np.float64)
    scale = np.asarray(quantizer.scale, np.float64)
    lowest, highest = ((float(end) - float(quantizer.zero_point)) * scale for end in (quantizer.low, quantizer.high))
    nearest = np.clip(x.astype(np.float64), lowest, highest)
    # Half a step, and the rounding of numbers up to 512 steps: 512 * 2^-24 for each of three operations.
    assert (np.abs(found - nearest) <= scale * (0.5 + 1e-4)).all()


@settings(deadline=None, max_examples=50)
@given(quantizer=quantizers(), seed=st.integers(0, 2**32 - 1))
def test_codes_are_integers_of_the_grid_and_steps_count_from_the_zero_point(quantizer: Uniform, seed: int) -> None:
    x = jnp.asarray(values_near_ties(quantizer, seed))
    found = np.asarray(quantizer.codes(x))
    assert found.min() >= quantizer.low and found.max() <= quantizer.high
    np.testing.assert_array_equal(found, np.round(found))
    np.testing.assert_array_equal(quantizer.steps(x), found - np.asarray(quantizer.zero_point))
    np.testing.assert_array_equal(quantizer.values(jnp.asarray(found)), quantizer.steps(x) * quantizer.scale)


def test_zero_is_represented_exactly_by_the_zero_point() -> None:
    quantizer = make(0.3, 11.0, 4)
    assert quantizer.codes(jnp.zeros(())) == 11.0
    assert quantizer.values(jnp.float32(11.0)) == 0.0


def test_with_scale_changes_the_scale_alone() -> None:
    old = make(np.arange(1, 9), 3.0, 5, signed=True)
    new = old.with_scale(jnp.full(8, 0.5))
    np.testing.assert_array_equal(new.scale, np.full(8, 0.5))
    for name in ("zero_point", "low", "high"):
        assert getattr(new, name) is getattr(old, name)
    np.testing.assert_array_equal(old.scale, np.arange(1, 9))


def test_clip_limits_steps_to_what_the_codes_can_hold() -> None:
    steps = np.arange(-20, 21, dtype=np.float32)
    clipped = make(0.1, 3.0, 4).clip(jnp.asarray(steps))  # codes 0 to 15, so steps -3 to 12
    np.testing.assert_array_equal(clipped, np.clip(steps, -3, 12) + 3)


def test_grid_bounds() -> None:
    assert [grid(bits, False) for bits in (2, 4, 8)] == [(0, 3), (0, 15), (0, 255)]
    assert [grid(bits, True) for bits in (2, 4, 8)] == [(-2, 1), (-8, 7), (-128, 127)]


def test_a_scale_for_each_part_of_the_last_axis_or_each_head() -> None:
    x = np.random.default_rng(5).normal(size=(2, 3, 4, 6)).astype(np.float32)
    scales = np.asarray([0.1, 0.2, 0.3], np.float32)
    parts, heads = make(scales, 0.0, 4, signed=True), make(scales.reshape(3, 1, 1), 0.0, 4, signed=True)
    for i, scale in enumerate(scales):
        one = make(scale, 0.0, 4, signed=True)
        for method in (lambda q, a: q.codes(a), lambda q, a: q.steps(a), lambda q, a: q.values(q.codes(a))):
            cut = x[..., 2 * i : 2 * i + 2]
            np.testing.assert_array_equal(method(parts, x)[..., 2 * i : 2 * i + 2], method(one, cut))
            np.testing.assert_array_equal(method(heads, x)[:, i], method(one, x[:, i]))


@given(seed=st.integers(0, 2**32 - 1), bits=st.integers(2, 8))
def test_a_learned_rounding_is_added_in_steps_before_rounding(seed: int, bits: int) -> None:
    rng = np.random.default_rng(seed)
    x, rounding = (rng.normal(size=(16, CHANNELS)).astype(np.float32) for _ in range(2))
    scale = rng.uniform(0.05, 0.5, CHANNELS).astype(np.float32)
    quantizer = make(scale, 2.0**bits // 2, bits)
    low, high, zero = (np.asarray(a) for a in (quantizer.low, quantizer.high, quantizer.zero_point))
    found = COMPILED_CODES(replace(quantizer, rounding=jnp.asarray(rounding)), x)
    np.testing.assert_array_equal(found, np.clip(np.rint(x / scale + zero + rounding), low, high))
    offset = OffsetUniform(quantizer.scale, quantizer.zero_point, quantizer.low, quantizer.high, jnp.asarray(rounding))
    np.testing.assert_array_equal(
        offset.codes(jnp.asarray(x)), np.clip(np.rint(x / scale + rounding) + zero, low, high)
    )
    np.testing.assert_array_equal(
        COMPILED_CODES(replace(quantizer, rounding=jnp.zeros_like(x)), x), COMPILED_CODES(quantizer, x)
    )


def test_a_learned_rounding_has_the_slope_of_a_step_within_the_grid() -> None:
    quantizer = make([0.5, 0.25], 0.0, 2)  # codes 0 to 3
    x = jnp.asarray([[0.6, 0.3], [-1.0, 9.0]])  # a row within the grid, and one beyond it

    def total(rounding: jax.Array) -> jax.Array:
        turned = replace(quantizer, rounding=rounding)
        return jnp.sum(turned.steps(x) * turned.scale)

    np.testing.assert_array_equal(jax.grad(total)(jnp.zeros((2, 2))), [[0.5, 0.25], [0.0, 0.0]])
