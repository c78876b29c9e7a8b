"""The focusing quantizer: all levels in one interval, clamped outside, straight-through inside and at the ends."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cptv_jax.quantizers import Focusing, Quantizer


def focusing(scale: float, start: float, bits: int) -> Focusing:
    return Focusing(jnp.float32(scale), jnp.float32(start), jnp.float32(2**bits - 1))


@given(
    st.lists(st.floats(-2, 2, width=32), min_size=1, max_size=30),
    st.sampled_from([0.01, 0.125, 0.3]),
    st.floats(-1, 1, width=32),
    st.integers(2, 8),
)
def test_values_are_those_of_the_nearest_level_of_the_interval(
    values: list[float], scale: float, start: float, bits: int
) -> None:
    quantizer = focusing(scale, start, bits)
    assert isinstance(quantizer, Quantizer)
    x = np.asarray(values, np.float32)
    levels = np.float64(np.float32(start)) + np.float64(np.float32(scale)) * np.arange(2**bits)
    found = np.asarray(quantizer.values(quantizer.codes(jnp.asarray(x))), np.float64)
    nearest = np.abs(levels[:, None] - x).min(0)
    # float32 of values up to 80 (256 steps of 0.3)
    np.testing.assert_allclose(np.abs(found - x), nearest, atol=1e-5)
    codes = np.asarray(quantizer.codes(jnp.asarray(x)))
    assert np.all((codes >= 0) & (codes < 2**bits) & (codes == np.round(codes)))
    np.testing.assert_allclose(quantizer.steps(jnp.asarray(x)) * quantizer.scale, found, atol=1e-5)


def test_another_scale_keeps_the_lower_end() -> None:
    wider = focusing(0.1, 0.2, 2).with_scale(jnp.float32(0.2))
    assert wider.start == np.float32(0.2) and wider.end == pytest.approx(0.8)


def test_derivatives_by_value_and_by_both_ends() -> None:
    quantizer = focusing(0.1, 0.2, 2)  # levels 0.2, 0.3, 0.4, 0.5
    x = jnp.asarray([0.0, 0.23, 0.38, 0.9])

    def values(quantizer: Focusing, x: jax.Array) -> jax.Array:
        return quantizer.values(quantizer.codes(x))

    by_quantizer, by_value = jax.jacrev(values, (0, 1))(quantizer, x)
    np.testing.assert_allclose(np.diag(by_value), [0, 1, 1, 0], atol=1e-6)
    # Inside, a shift of all levels leaves the value where it was; outside, the value goes with its end.
    np.testing.assert_allclose(by_quantizer.start, [1, 0, 0, 1], atol=1e-6)
    # Inside, level less position; below, nothing; above, the number of steps.
    np.testing.assert_allclose(by_quantizer.scale, [0, 0 - 0.3, 2 - 1.8, 3], atol=1e-5)


def test_a_tensor_of_one_value_has_a_finite_interval() -> None:
    from cptv_jax.methods.aiqvit import fit_focusing

    attention = jnp.full((1, 2, 4, 4), 0.25)
    quantizer = fit_focusing(attention, jnp.ones((1, 2, 4, 3)), 4, per_head=True)
    np.testing.assert_array_equal(quantizer.values(quantizer.codes(attention)), attention)
