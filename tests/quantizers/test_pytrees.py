"""Quantizers are values that JAX's transformations see through."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cptv_jax.quantizers import (
    BiasCorrected,
    DualUniform,
    Focusing,
    FractionalUniform,
    Log2,
    LogSqrt2,
    LowRank,
    OffsetUniform,
    Quantizer,
    TwinGelu,
    TwinSoftmax,
    Uniform,
)

UNIFORM = Uniform(jnp.asarray([0.5, 0.25]), jnp.float32(2.0), jnp.float32(0.0), jnp.float32(15.0))
EVERY: dict[str, tuple[Quantizer, int]] = {
    "uniform": (UNIFORM, 4),
    "bias corrected": (BiasCorrected(UNIFORM, jnp.ones(2)), 5),
    "twin softmax": (TwinSoftmax(jnp.float32(0.03), jnp.float32(8.0), jnp.float32(7.0), jnp.float32(0.0)), 4),
    "twin gelu": (TwinGelu(jnp.float32(0.2), jnp.float32(0.01), jnp.float32(-8.0), jnp.float32(7.0)), 4),
    "log2": (Log2(jnp.float32(15.0)), 1),
    "offset uniform": (OffsetUniform(jnp.asarray([0.5, 0.25]), jnp.float32(2.5), UNIFORM.low, UNIFORM.high), 4),
    "fractional uniform": (
        FractionalUniform(OffsetUniform(jnp.asarray([0.5, 0.25]), jnp.float32(2.390625), UNIFORM.low, UNIFORM.high)),
        4,
    ),
    "log-sqrt2": (LogSqrt2(jnp.float32(2.0), jnp.float32(15.0)), 2),
    "dual uniform": (
        DualUniform(
            jnp.asarray([0.5, 0.25]),
            jnp.asarray([2.0, 3.0]),
            jnp.asarray([1.5, 3.0]),
            jnp.asarray([1.0, 0.0]),
            jnp.arange(7) % 3 == 0,
            UNIFORM.low,
            UNIFORM.high,
        ),
        7,
    ),
}
EVERY |= {
    "focusing": (Focusing(jnp.float32(0.2), jnp.float32(0.3), jnp.float32(15.0)), 3),
    "low rank": (LowRank(UNIFORM, jnp.ones((7, 3)), jnp.ones((3, 2))), 6),
}
X = jnp.asarray(np.random.default_rng(0).uniform(0.01, 4, (7, 2)), jnp.float32)


@pytest.fixture(params=EVERY)
def quantizer(request: pytest.FixtureRequest) -> Quantizer:
    return EVERY[request.param][0]


@pytest.mark.parametrize("name", EVERY)
def test_every_parameter_is_a_leaf(name: str) -> None:
    quantizer, leaves = EVERY[name]
    assert isinstance(quantizer, Quantizer)
    assert len(jax.tree.leaves(quantizer)) == leaves  # bounds too: sites of different widths share a program


def test_flattening_and_back_gives_the_same_quantizer(quantizer: Quantizer) -> None:
    leaves, structure = jax.tree.flatten(quantizer)
    again = jax.tree.unflatten(structure, leaves)
    assert type(again) is type(quantizer)
    np.testing.assert_array_equal(again.codes(X), quantizer.codes(X))


def test_a_stack_of_quantizers_maps_to_the_codes_of_each(quantizer: Quantizer) -> None:
    others = [jax.tree.map(lambda leaf, i=i: leaf * 2.0**-i, quantizer) for i in range(3)]
    stack = jax.tree.map(lambda *leaves: jnp.stack(leaves), *others)
    found = jax.jit(jax.vmap(lambda one: one.codes(X)))(stack)
    for codes, one in zip(found, others, strict=True):
        np.testing.assert_array_equal(codes, one.codes(X))


def test_widths_share_one_compiled_program() -> None:
    traces = []

    @jax.jit
    def run(quantizer: Uniform) -> jax.Array:
        traces.append(quantizer)
        return quantizer.codes(X)

    for high in (3.0, 15.0, 255.0):
        run(Uniform(UNIFORM.scale, UNIFORM.zero_point, UNIFORM.low, jnp.float32(high)))
    assert len(traces) == 1


def test_steps_have_a_derivative_by_the_values_and_by_the_scale(quantizer: Quantizer) -> None:
    # What is learned by gradients (block reconstruction) would stay where it is with the derivatives of rounding.
    slopes = jax.grad(lambda x: jnp.sum(quantizer.steps(x) * quantizer.scale))(X)
    assert np.isfinite(slopes).all() and np.mean(np.asarray(slopes) > 0) > 0.25
    if not isinstance(quantizer, Log2):  # has no scale to learn

        def values(scale: jax.Array) -> jax.Array:
            moved = quantizer.with_scale(scale)
            return jnp.sum((moved.steps(X) * moved.scale) ** 2)

        assert np.all(np.asarray(jax.grad(values)(quantizer.scale)) != 0)
