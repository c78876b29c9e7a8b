"""Differentiable execution: FakeQuant's numbers bit for bit, and derivatives that float32 products would give too."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_vit import normal, quantized, small_images, uniform

from cptv_jax.interpreters import FakeQuant, StraightThrough, Tensor
from cptv_jax.interpreters.arithmetic import Arithmetic, round_to_bf16
from cptv_jax.quantized.execution import Differentiable, Execution, Simulated
from cptv_jax.quantized.model import QuantizedModel
from cptv_jax.quantizers import BiasCorrected, Log2, LowRank, Quantizer, Uniform
from cptv_jax.runtime.arithmetics import supported_arithmetics

needs_bf16 = pytest.mark.skipif("bf16-codes" not in supported_arithmetics(), reason="no bfloat16 products here")


def forward(model: QuantizedModel, images: np.ndarray, execution: Execution) -> list[np.ndarray]:
    x, found = images, []
    for stage in model.stages(execution):
        x = jax.jit(stage.function)(stage.state, x)
        found += [np.asarray(leaf) for leaf in ([x.values] if isinstance(x, Tensor) else jax.tree.leaves(x))]
    return found


@pytest.mark.parametrize(
    "preset",
    [pytest.param("evol-q", marks=pytest.mark.slow), pytest.param("fq-vit", marks=pytest.mark.slow), "repq-vit"],
)
def test_every_stage_has_the_numbers_of_the_simulated_one(golden: Path, preset: str) -> None:
    model, images = quantized(golden, preset), small_images(golden)[1][:4]
    for exact, traced in zip(
        forward(model, images, Simulated()), forward(model, images, Differentiable()), strict=True
    ):
        np.testing.assert_array_equal(traced, exact)


def gradient(ops: StraightThrough, x: Tensor, kernel: jax.Array, bias: jax.Array) -> Any:
    """Derivatives of a linear layer's sum of squares by all that it reads."""

    def loss(values: jax.Array, kernel: jax.Array, bias: jax.Array, quantizers: dict[str, Quantizer]) -> jax.Array:
        ops.quantizers = quantizers
        return jnp.sum(ops.linear("fc", kernel, bias, ops.tensor("x", Tensor(values))).values ** 2)

    quantizers = dict(ops.quantizers)
    return jax.grad(loss, (0, 1, 2, 3))(x.values, kernel, bias, quantizers)


def layer(weight: Quantizer) -> tuple[dict[str, Quantizer], Tensor, jax.Array, jax.Array]:
    quantizers: dict[str, Quantizer] = {"x": uniform(0.04, 117.0), "fc.weight": weight}
    return (
        quantizers,
        Tensor(jnp.asarray(normal(0, 2, 7, 24))),
        jnp.asarray(normal(1, 24, 5)),
        jnp.asarray(normal(2, 5)),
    )


def weights() -> dict[str, Quantizer]:
    grid = uniform(np.full(5, 0.3), 8.0, high=15.0)
    return {
        "uniform": grid,
        "bias-corrected": BiasCorrected(grid, jnp.linspace(0.9, 1.1, 5)),
        "low-rank": LowRank(grid, jnp.asarray(normal(3, 24, 2)), jnp.asarray(normal(4, 2, 5))),
    }


@pytest.mark.parametrize("weight", weights())
def test_a_linear_layer_has_the_derivative_of_its_product_in_values(weight: str) -> None:
    quantizers, x, kernel, bias = layer(weights()[weight])
    found = gradient(StraightThrough(quantizers), x, kernel, bias)

    def effective(kernel: jax.Array, quantizer: Any) -> jax.Array:
        grid = quantizer if isinstance(quantizer, Uniform) else quantizer.base
        steps = grid.steps(kernel)
        if isinstance(quantizer, BiasCorrected):
            mean, deviation = jnp.mean(steps, 0), jnp.std(steps, 0, ddof=1)
            gain = jnp.std(kernel, 0, ddof=1) / (deviation * grid.scale)
            moved = gain * (steps - mean) * grid.scale + jnp.mean(kernel, 0)
            return moved * quantizer.factor
        values = steps * grid.scale
        return values + quantizer.down @ quantizer.up if isinstance(quantizer, LowRank) else values

    def loss(x: jax.Array, kernel: jax.Array, bias: jax.Array, quantizers: dict[str, Any]) -> jax.Array:
        grid = quantizers["x"]
        values = grid.values(grid.codes(x))
        return jnp.sum((values @ effective(kernel, quantizers["fc.weight"]) + bias) ** 2)

    wanted = jax.grad(loss, (0, 1, 2, 3))(x.values, kernel, bias, quantizers)
    # Sums of a few dozen float32 products, taken in another order.
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-4 * float(np.max(np.abs(b))) + 1e-6)


@needs_bf16
@pytest.mark.parametrize("weight", weights())
def test_bfloat16_products_change_a_derivative_by_their_rounding_alone(weight: str) -> None:
    quantizers, x, kernel, bias = layer(weights()[weight])
    found, wanted = (
        gradient(StraightThrough(quantizers, arithmetic=Arithmetic(name)), x, kernel, bias)
        for name in ("bf16-codes", "float32")
    )
    # Two factors of 8 significant bits each, so 2^-8 a product, relative to the largest of the sum's terms.
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=0.02 * float(np.max(np.abs(b))) + 1e-6)
    assert not all(np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, (found, wanted)), strict=True))


@pytest.mark.parametrize("arithmetic", supported_arithmetics())
def test_attention_has_the_derivative_of_its_products(arithmetic: Any) -> None:
    ops = StraightThrough({"q": uniform(0.05, 128.0), "k": uniform(0.05, 128.0)}, arithmetic=Arithmetic(arithmetic))
    q, k = jnp.asarray(normal(0, 2, 3, 7, 8)), jnp.asarray(normal(1, 2, 3, 8, 5))

    def scores(q: jax.Array, k: jax.Array) -> jax.Array:
        return jnp.sum(ops.matmul("s", ops.tensor("q", Tensor(q)), ops.tensor("k", Tensor(k)), 0.5).values ** 2)

    def plain(q: jax.Array, k: jax.Array) -> jax.Array:
        grids = [ops.quantizers[name] for name in "qk"]
        a, b = (grid.values(grid.codes(x)) for grid, x in zip(grids, (q, k), strict=True))
        return jnp.sum((0.5 * a @ b) ** 2)

    found, wanted = jax.grad(scores, (0, 1))(q, k), jax.grad(plain, (0, 1))(q, k)
    allowed = 0.02 if arithmetic == "bf16-codes" else 1e-5
    for a, b in zip(found, wanted, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=allowed * float(np.max(np.abs(b))))


def test_integer_softmax_and_layer_norm_have_the_derivatives_of_their_float_forms() -> None:
    x = jnp.asarray(normal(0, 3, 16))
    weight, bias = jnp.asarray(normal(1, 16)), jnp.asarray(normal(2, 16))
    quantizers: dict[str, Quantizer] = {
        "x": uniform(0.03, 128.0),
        "n": uniform(0.04, 128.0),
        "s": Log2(jnp.float32(15)),
    }
    ops = StraightThrough(quantizers, integer_layer_norm=True, log_int_softmax=True)
    mix = jnp.asarray(normal(3, 3, 16))

    def norm(x: jax.Array) -> jax.Array:
        return jnp.sum(mix * ops.layer_norm("n", weight, bias, 1e-6, ops.tensor("x", Tensor(x))).values)

    def soft(x: jax.Array) -> jax.Array:
        return jnp.sum(mix * ops.softmax("s", ops.tensor("x", Tensor(x))).values)

    rounded = ops.tensor("x", Tensor(x)).values

    def float_norm(x: jax.Array) -> jax.Array:
        centred = x - x.mean(-1, keepdims=True)
        return jnp.sum(mix * (centred / jnp.sqrt((centred**2).mean(-1, keepdims=True)) * weight + bias))

    # The same formulas; only their sums are ordered otherwise.
    np.testing.assert_allclose(jax.grad(norm)(x), jax.grad(float_norm)(rounded), rtol=1e-4, atol=1e-5)
    wanted = jax.grad(lambda x: jnp.sum(mix * jax.nn.softmax(x, -1)))(rounded)
    np.testing.assert_allclose(jax.grad(soft)(x), wanted, rtol=1e-4, atol=1e-6)


def test_values_are_the_exact_ones_of_a_layer_that_is_differentiated() -> None:
    quantizers, x, kernel, bias = layer(weights()["bias-corrected"])
    plain, traced = FakeQuant(quantizers), StraightThrough(quantizers)
    value, _ = jax.vjp(lambda k: traced.linear("fc", k, bias, traced.tensor("x", x)).values, kernel)
    np.testing.assert_array_equal(value, plain.linear("fc", kernel, bias, plain.tensor("x", x)).values)


def test_bfloat16_takes_the_nearest_of_finite_values() -> None:
    x = np.concatenate(
        [
            normal(0, 1000) * 10.0 ** np.random.default_rng(1).integers(-30, 30, 1000),
            [0.0, -0.0, 1.0, -255.0, 1.00390625],
        ]
    ).astype(np.float32)
    found = np.asarray(round_to_bf16(jnp.asarray(x)).astype(jnp.float32))
    assert np.all(np.abs(found - x) <= np.abs(x) * 2.0**-8)
    whole = np.arange(-256, 257, dtype=np.float32)
    np.testing.assert_array_equal(round_to_bf16(jnp.asarray(whole)).astype(jnp.float32), whole)


def test_a_moved_tensor_keeps_its_slope() -> None:
    ops = StraightThrough({"x": uniform(0.05, 128.0)})

    def loss(x: jax.Array) -> jax.Array:
        return jnp.sum(ops.tensor("x", Tensor(x)).move(lambda a: a[:, :2].T).values[0] * 3.0)

    wanted = np.zeros((4, 3), np.float32)
    wanted[:, 0] = 3.0
    np.testing.assert_allclose(jax.grad(loss)(jnp.asarray(normal(0, 4, 3))), wanted, rtol=1e-6)
    assert replace(ops.tensor("x", Tensor(jnp.ones(3)))).shape == (3,)
