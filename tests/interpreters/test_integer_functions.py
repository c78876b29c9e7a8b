"""Integer LayerNorm and log-int-softmax against NumPy transcriptions of the published formulas."""

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cptv_jax.interpreters.integer_functions import integer_layer_norm, log_int_softmax_exponents

F = np.float32
LAYER_NORM = jax.jit(integer_layer_norm)
EXPONENTS = jax.jit(log_int_softmax_exponents)
CHANNELS, TOKENS = 16, 32


# Integer LayerNorm


def published_layer_norm(
    steps: np.ndarray, scale: np.ndarray, weight: np.ndarray, bias: np.ndarray, out_scale: np.ndarray
) -> np.ndarray:
    """FQ-ViT's QIntLayerNorm in integer mode (golden README, fact 8), float32, operation by operation."""
    channels = F(steps.shape[-1])
    smallest = scale.min()
    x = np.rint(steps) * np.rint(scale / smallest)
    mean = x.mean(-1, dtype=F) * smallest
    deviation = smallest / channels * np.sqrt(channels * (x**2).sum(-1, dtype=F) - x.sum(-1, dtype=F) ** 2)
    a = (smallest / deviation)[..., None] * weight / out_scale
    with np.errstate(divide="ignore"):
        n = np.clip(7 - np.floor(np.log2(np.abs(a))), 0, 31).astype(F)
    two_to_n = np.exp2(n)
    m = np.clip(np.floor(np.abs(a) * two_to_n), 0, 255)
    b = np.rint((bias - (mean / deviation)[..., None] * weight) / out_scale * two_to_n)
    result = np.rint((np.sign(a) * m * x + b) / two_to_n)
    assert result.dtype == np.float32
    return result


def layer_norm_case(seed: int, out_scale_per_channel: bool = False) -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(seed)
    # |total| <= 16 channels * 15 steps * 8 < 2^11: every sum, square and difference is an exact float32 integer,
    # so that neither the order of summation nor fused multiply-adds can make a difference.
    steps = rng.integers(-15, 16, (TOKENS, CHANNELS)).astype(F)
    scale = (F(rng.uniform(0.01, 0.1)) * 2.0 ** rng.integers(0, 4, CHANNELS)).astype(F)
    weight = (rng.normal(size=CHANNELS) + 0.5).astype(F)
    weight[0] = 0
    bias = rng.normal(size=CHANNELS).astype(F)
    out_scale = rng.uniform(0.02, 0.1, CHANNELS if out_scale_per_channel else ()).astype(F)
    return steps, scale, weight, bias, np.asarray(out_scale, F)


@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 2**32 - 1))
def test_integer_layer_norm_is_the_published_formula(seed: int) -> None:
    case = layer_norm_case(seed)
    found, expected = np.asarray(LAYER_NORM(*case)), published_layer_norm(*case)
    # `bias - mean / deviation * weight` may be fused into one rounding, which can move a tie: by one step, rarely.
    assert np.abs(found - expected).max() <= 1
    assert (found != expected).sum() <= 1


def test_integer_layer_norm_takes_a_single_scale_too() -> None:
    steps, scale, weight, bias, out_scale = layer_norm_case(1)
    one = np.asarray(scale[0])
    found = LAYER_NORM(steps, one, weight, bias, out_scale)
    np.testing.assert_array_equal(found, published_layer_norm(steps, one, weight, bias, out_scale))


def test_integer_layer_norm_rounds_its_input_and_never_clamps_its_output() -> None:
    steps, scale, weight, bias, out_scale = layer_norm_case(2)
    noise = np.random.default_rng(0).uniform(-0.4, 0.4, steps.shape).astype(F)
    found = np.asarray(LAYER_NORM(steps + noise, scale, weight, bias, out_scale))
    np.testing.assert_array_equal(found, LAYER_NORM(steps, scale, weight, bias, out_scale))
    np.testing.assert_array_equal(found, np.round(found))
    fine = np.asarray(LAYER_NORM(steps, scale, weight, bias, out_scale / 16))
    assert np.abs(fine).max() > 600  # past any grid of 8 bits


@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 2**32 - 1), per_channel=st.booleans())
def test_integer_layer_norm_is_near_layer_norm(seed: int, per_channel: bool) -> None:
    steps, scale, weight, bias, out_scale = layer_norm_case(seed, per_channel)
    values = np.float64(steps) * np.float64(scale)
    centred = values - values.mean(-1, keepdims=True)
    deviation = np.sqrt((centred**2).mean(-1, keepdims=True))
    exact = centred / deviation * weight + bias
    found = np.float64(LAYER_NORM(steps, scale, weight, bias, out_scale)) * np.float64(out_scale)
    # The multiplier keeps 8 leading bits, truncated: within 2^-7. The output is rounded to half a step, the
    # intercept to half of 2^-7 of a step or less (its shift is at least 7 for multipliers below 2, as here all but
    # the largest), and float32 adds next to nothing.
    bound = np.abs(values / deviation * weight) * 2.0**-7 + 0.52 * out_scale + 1e-4
    multiplier = np.abs(scale.min() / deviation * weight / out_scale)
    bound = bound + np.where(multiplier < 2, 0, 0.5 * out_scale)
    assert (np.abs(found - exact) <= bound).all()


@pytest.mark.parametrize("value", [0, 7, -15])
@pytest.mark.parametrize("channels", [16, 64, 192])
def test_a_constant_token_normalizes_to_the_bias(value: int, channels: int) -> None:
    rng = np.random.default_rng(channels)
    steps = np.full((2, channels), value, F)
    steps[1] = rng.integers(-15, 16, channels)  # its neighbour is an ordinary token
    weight, bias = rng.normal(size=(2, channels)).astype(F)
    found = np.asarray(LAYER_NORM(steps, F(0.05), weight, bias, F(0.03)))
    np.testing.assert_array_equal(found[0], np.rint(bias / F(0.03)))
    ordinary = published_layer_norm(steps[1:], np.asarray(F(0.05)), weight, bias, np.asarray(F(0.03)))[0]
    assert np.abs(found[1] - ordinary).max() <= 1  # sums of 192 channels round


# Log-int-softmax


def published_exponents(steps: np.ndarray, scale: np.float32) -> np.ndarray:
    """FQ-ViT's QIntSoftmax: int_softmax, the rounded quotient, log_round; float32, operation by operation."""
    b, c = 0.96963238 / 0.35815147, 1.0 / 0.35815147
    x = steps - steps.max(-1, keepdims=True)
    ln2 = np.floor(F(-0.6931) / scale)
    x = np.maximum(x, F(30) * ln2)
    q = np.floor(x / ln2)
    r = x - ln2 * q
    z = (r + np.floor(F(b) / scale)) * r + np.floor(F(c) / (scale * scale))
    exponentials = np.maximum(np.floor(z * np.exp2(F(30) - q)), F(0))
    assert exponentials.dtype == np.float32
    quotient = np.rint(exponentials.sum(-1, keepdims=True, dtype=F) / exponentials)
    big = np.floor(np.log2(quotient))
    return big + (quotient - np.exp2(big) >= np.exp2(big - 1))


def scores(seed: int, keys: int = 17) -> tuple[np.ndarray, np.float32]:
    rng = np.random.default_rng(seed)
    scale = F(rng.uniform(0.02, 0.1))
    return rng.integers(-128, 128, (40, keys)).astype(F), scale


@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 2**32 - 1))
def test_log_int_softmax_is_the_published_formula(seed: int) -> None:
    steps, scale = scores(seed)
    found, expected = np.asarray(EXPONENTS(steps, scale)), published_exponents(steps, scale)
    # Sums past 2^24 depend on their order, so the rounded quotient may fall on the other side of a tie.
    assert np.abs(found - expected).max() <= 1
    assert (found != expected).sum() <= 3  # of 680


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 2**32 - 1))
def test_exponents_are_near_those_of_the_softmax(seed: int) -> None:
    steps, _ = scores(seed)
    scale = F(0.01)  # coarser scales bend the exponential more: ln 2 is a whole number of steps there
    values = np.float64(steps) * scale
    exact = np.exp(values - values.max(-1, keepdims=True))
    exact = -np.log2(exact / exact.sum(-1, keepdims=True))
    found = np.asarray(EXPONENTS(steps, scale))
    # Rounding the logarithm at 1.5 instead of the root of 2 is 0.585 at worst. ln 2 as 70 steps instead of 69.3 is
    # 1% of an exponent up to 9, and the polynomial is within 2%.
    assert exact.max() > 5
    assert np.abs(found - exact).max() <= 0.585 + 0.12


def test_a_row_with_scores_far_below_the_others_is_finite() -> None:
    for low in (-1e6, -1e30, -3e38):
        steps = np.array([[0, low, low, low], [-5, -5, low, low]], F)
        found = np.asarray(EXPONENTS(steps, F(0.05)))
        np.testing.assert_array_equal(found[:, 0], [0, 1])
        np.testing.assert_array_equal(found[1, :2], [1, 1])
        # The published code clamps at -30 ln 2: far away, and off every grid.
        assert np.isfinite(found).all() and (found[0, 1:] >= 30).all() and (found[1, 2:] >= 30).all()


def test_equal_scores_share_evenly() -> None:
    for keys in (1, 2, 4, 16):
        np.testing.assert_array_equal(EXPONENTS(np.zeros((3, keys), F), F(0.1)), np.full((3, keys), np.log2(keys)))


def test_exponents_do_not_depend_on_a_shift_of_the_scores() -> None:
    steps, scale = scores(5)
    np.testing.assert_array_equal(EXPONENTS(steps, scale), EXPONENTS(steps + 64, scale))
