"""Simulated quantization: each operation against float64 NumPy, and whole models against themselves."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_vit import small_model
from scipy.special import erf
from small_vit import RNG, normal, quantized, small_images, uniform

from cptv_jax.interpreters import FakeQuant, Float, Tensor, list_sites
from cptv_jax.interpreters.integer_functions import integer_layer_norm
from cptv_jax.models.architecture import Architecture, sites_of
from cptv_jax.models.preprocessing import Preprocessing
from cptv_jax.models.vit import ViTConfig
from cptv_jax.models.vit_family import VIT
from cptv_jax.quantized.execution import Simulated, Unrounded
from cptv_jax.quantizers import BiasCorrected, Log2, Uniform
from cptv_jax.runtime.forward import forward

# Without quantizers


def float64_block(x: np.ndarray, w: Mapping[str, np.ndarray], heads: int, epsilon: float) -> np.ndarray:
    """A pre-norm block as the ViT paper has it, on torch-shaped weights, head by head, in float64."""

    def layer_norm(x: np.ndarray, name: str) -> np.ndarray:
        mean, variance = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
        return (x - mean) / np.sqrt(variance + epsilon) * w[f"{name}.weight"] + w[f"{name}.bias"]

    def linear(x: np.ndarray, name: str) -> np.ndarray:
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    width = x.shape[-1]
    head = width // heads
    qkv = linear(layer_norm(x, "norm1"), "attn.qkv")
    context = np.zeros_like(x)
    for h in range(heads):
        query, key, value = (qkv[..., part * width + h * head :][..., :head] for part in range(3))
        scores = query @ key.swapaxes(1, 2) / np.sqrt(head)
        attention = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
        context[..., h * head : (h + 1) * head] = attention @ value
    x = x + linear(context, "attn.proj")
    hidden = linear(layer_norm(x, "norm2"), "mlp.fc1")
    return x + linear(hidden * (1 + erf(hidden / np.sqrt(2))) / 2, "mlp.fc2")


@pytest.mark.parametrize("block", [0, 2])
def test_without_quantizers_a_block_is_the_plain_formula(golden: Path, block: int) -> None:
    with np.load(golden / "model.npz") as file:
        prefix = f"blocks.{block}."
        weights = {k.removeprefix(prefix): np.asarray(v, np.float64) for k, v in file.items() if k.startswith(prefix)}
    x = normal(0, 2, 17, 64)
    stage = {stage.name: stage for stage in small_model(golden).stages()}[f"blocks.{block}"]
    found = jax.jit(stage.function)(stage.state, Tensor(jnp.asarray(x)))
    assert found.scale is None
    # float32 sums of 64 to 256 terms of order 1 (2^-24 * sqrt(256) * a few operations) against float64.
    expected = float64_block(x.astype(np.float64), weights, 4, 1e-6)
    # Of the last block the head reads the class token alone, and no other is computed.
    expected = expected[:, :1] if block == 2 else expected
    np.testing.assert_allclose(found.values, expected, rtol=0, atol=1e-5)


def test_the_layer_norm_epsilon_is_added_to_the_variance() -> None:
    x = normal(0, 3, 8) * np.float32(1e-3)
    found = Float().layer_norm("n", jnp.ones(8), jnp.zeros(8), 1e-6, Tensor(jnp.asarray(x)))
    exact = np.float64(x)
    exact = (exact - exact.mean(-1, keepdims=True)) / np.sqrt(exact.var(-1, keepdims=True) + 1e-6)
    # Variance and epsilon are alike here, so any other place or size of the epsilon is off by percents.
    np.testing.assert_allclose(found.values, exact, rtol=1e-5, atol=1e-6)


# Linear layers and matmuls


def dequantized(quantizer: Uniform, x: np.ndarray) -> np.ndarray:
    """clamp(round(x / s + z)) - z, times s: division in float32 decides the codes, the rest is float64."""
    scale, zero, low, high = (
        np.asarray(a) for a in (quantizer.scale, quantizer.zero_point, quantizer.low, quantizer.high)
    )
    return (np.clip(np.rint(x / scale + zero), low, high) - zero).astype(np.float64) * scale


INPUT_SCALES = {
    "float": None,
    "per tensor": uniform(0.03, 120.0),
    "per channel": uniform(0.01 * 2.0 ** RNG(9).integers(0, 4, 24), 120.0),
}
KERNEL = normal(1, 24, 10) * np.float32(0.3)
BIAS = normal(2, 10)
WEIGHT_QUANTIZER = uniform(np.ptp(KERNEL, axis=0) / 15, 7.0, 0, 15)


def corrected(weight: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    """Mean and unbiased deviation of each output channel as in the float kernel (Banner et al., section 3)."""
    exact = np.float64(kernel)
    gain = exact.std(0, ddof=1) / (weight.std(0, ddof=1) + 1e-8)
    return (weight - weight.mean(0)) * gain + exact.mean(0)


@pytest.mark.parametrize("granularity", INPUT_SCALES)
@pytest.mark.parametrize("bias_correction", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
def test_a_quantized_linear_layer_is_the_float_layer_of_the_dequantized_tensors(
    granularity: str, bias_correction: bool, with_bias: bool
) -> None:
    x = normal(3, 4, 5, 24)
    quantizer = INPUT_SCALES[granularity]
    tensor = Tensor(jnp.asarray(x))
    exact_x = x.astype(np.float64)
    if quantizer is not None:
        tensor, exact_x = Tensor(quantizer.steps(jnp.asarray(x)), quantizer.scale), dequantized(quantizer, x)
    exact_weight = dequantized(WEIGHT_QUANTIZER, KERNEL)
    if bias_correction:
        exact_weight = corrected(exact_weight, KERNEL)
    ops = FakeQuant({"fc.weight": BiasCorrected(WEIGHT_QUANTIZER) if bias_correction else WEIGHT_QUANTIZER})
    bias = jnp.asarray(BIAS) if with_bias else None
    found = jax.jit(lambda t: ops.linear("fc", jnp.asarray(KERNEL), bias, t))(tensor)
    assert found.scale is None  # the site "fc" itself is not quantized
    expected = exact_x @ exact_weight + (BIAS if with_bias else 0)
    # float32 against float64 on sums of 24 products of order 1; bias correction adds float32 means and deviations.
    np.testing.assert_allclose(found.values, expected, rtol=0, atol=1e-5)
    assert np.abs(expected - (exact_x @ KERNEL + (BIAS if with_bias else 0))).max() > 0.05


def test_the_sums_of_a_quantized_linear_layer_are_exact() -> None:
    # 768 products of 8-bit steps stay below 2^24, so only two products with scales round: 3 * 2^-24. Summing values
    # instead is off by far more where a sum nearly cancels, and depends on the order of summation.
    x, kernel = normal(10, 16, 768), normal(11, 768, 64)
    qx, qw = uniform(0.03, 128.0), uniform(np.ptp(kernel, axis=0) / 255, 127.0)
    ops = FakeQuant({"fc.weight": qw})
    tensor = Tensor(qx.steps(jnp.asarray(x)), qx.scale)
    found = jax.jit(lambda t: ops.linear("fc", jnp.asarray(kernel), None, t))(tensor)
    np.testing.assert_allclose(found.values, dequantized(qx, x) @ dequantized(qw, kernel), rtol=2e-7)


def test_the_output_of_a_linear_layer_is_quantized_after_the_bias() -> None:
    x, out = normal(3, 4, 24), uniform(0.5, 8.0, 0, 15)
    found = FakeQuant({"fc": out}).linear("fc", jnp.asarray(KERNEL), jnp.asarray(BIAS), Tensor(jnp.asarray(x)))
    assert found.scale is not None and found.scale == 0.5
    plain = np.float64(x) @ KERNEL + BIAS
    np.testing.assert_array_equal(found.steps, np.clip(np.rint(plain / 0.5 + 8), 0, 15) - 8)


def test_a_quantized_matmul_is_the_float_matmul_of_the_dequantized_tensors() -> None:
    a, b = normal(4, 2, 3, 5, 8), normal(5, 2, 3, 8, 6)
    qa, qb = uniform(0.02, 130.0), uniform(0.04, 120.0)
    found = FakeQuant({}).matmul(
        "m", Tensor(qa.steps(jnp.asarray(a)), qa.scale), Tensor(qb.steps(jnp.asarray(b)), qb.scale), 0.25
    )
    expected = dequantized(qa, a) @ dequantized(qb, b) * 0.25
    # The sum of steps is exact; what remains are the roundings of two products.
    np.testing.assert_allclose(found.values, expected, rtol=3e-7)


def test_log2_attention_enters_the_matmul_by_its_values() -> None:
    attention = RNG(0).dirichlet(np.ones(8), 5).astype(np.float32)
    value = normal(6, 8, 4)
    quantizer = Log2(jnp.float32(15.0))
    ops = FakeQuant({"softmax": quantizer})
    x = ops.softmax("softmax", Tensor(jnp.log(jnp.asarray(attention))))
    found = ops.matmul("m", x, Tensor(jnp.asarray(value))).values
    exponents = np.rint(-np.log2(np.float64(attention)))
    expected = np.where(exponents < 16, 2.0**-exponents, 0) @ np.float64(value)
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6)


def test_operands_are_quantized_only_where_the_recipe_says_so() -> None:
    x = Tensor(jnp.asarray(normal(7, 5, 4)), jnp.float32(0.5))
    assert FakeQuant({}).operand("query", x) is x
    quantizer = uniform(1.0, 8.0, 0, 15)
    found = FakeQuant({"query": quantizer}).operand("query", x)
    np.testing.assert_array_equal(found.steps, quantizer.steps(x.values))
    assert found.scale is quantizer.scale


# Integer LayerNorm and softmax


def test_integer_layer_norm_runs_only_when_asked_and_where_input_and_output_are_quantized() -> None:
    scale = jnp.full(16, 0.05)
    x = Tensor(jnp.asarray(RNG(0).integers(-60, 60, (3, 16)), jnp.float32), scale)
    weight, bias, out = jnp.ones(16) * 1.7, jnp.zeros(16), uniform(0.01, 128.0)
    steps = np.asarray(integer_layer_norm(x.steps, scale, weight, bias, out.scale))
    clipped = np.clip(steps, -128, 127)
    assert (clipped != steps).any()

    def run(x: Tensor, quantizers: dict[str, Uniform], flag: bool) -> Tensor:
        return FakeQuant(quantizers, integer_layer_norm=flag).layer_norm("n", weight, bias, 1e-6, x)

    found = run(x, {"n": out}, True)
    np.testing.assert_array_equal(found.steps, clipped)
    assert found.scale is out.scale
    exact = Float().layer_norm("n", weight, bias, 1e-6, x).values
    rounded = out.steps(exact)
    assert (np.asarray(rounded) != clipped).any()  # the integer form is visible
    np.testing.assert_array_equal(run(x, {"n": out}, False).steps, rounded)
    np.testing.assert_array_equal(run(Tensor(x.values), {"n": out}, True).steps, rounded)
    np.testing.assert_array_equal(run(x, {}, True).values, exact)


def test_without_rounding_values_pass_unrounded_but_carry_their_scale() -> None:
    quantizer = uniform(0.3, 8.0, 0, 15)
    ops = FakeQuant({"t": quantizer, "fc.weight": WEIGHT_QUANTIZER}, rounding=False)
    x = normal(8, 5, 24) * np.float32(10)  # past the range of 15 steps of 0.3
    found = ops.tensor("t", Tensor(jnp.asarray(x)))
    np.testing.assert_array_equal(found.steps, x / np.float32(0.3))
    assert found.scale is quantizer.scale
    linear = ops.linear("fc", jnp.asarray(KERNEL), None, Tensor(jnp.asarray(x)))
    np.testing.assert_allclose(linear.values, np.float64(x) @ KERNEL, rtol=0, atol=2e-5)  # the kernel stays float


def test_without_rounding_the_integer_layer_norm_still_acts_and_does_not_clamp() -> None:
    scale = jnp.full(16, 0.05)
    x = Tensor(jnp.asarray(RNG(0).integers(-60, 60, (3, 16)), jnp.float32), scale)
    weight, bias, out = jnp.ones(16) * 1.7, jnp.zeros(16), uniform(0.01, 128.0)
    ops = FakeQuant({"n": out}, integer_layer_norm=True, rounding=False)
    found = ops.layer_norm("n", weight, bias, 1e-6, x)
    np.testing.assert_array_equal(found.steps, integer_layer_norm(x.steps, scale, weight, bias, out.scale))
    assert np.abs(np.asarray(found.steps)).max() > 128


# Whole models


@pytest.mark.slow
def test_without_rounding_a_model_with_float_layer_norm_is_the_float_model(golden: Path) -> None:
    images = small_images(golden)[1][:8]
    teacher = forward(small_model(golden).stages(), images).logits
    plain = forward(quantized(golden, "evol-q-omse").stages(Unrounded()), images).logits
    # x / scale * scale at every site: roundings of 2^-24 through three blocks, on logits of order 10.
    np.testing.assert_allclose(plain, teacher, rtol=0, atol=1e-4)
    integer = forward(quantized(golden, "evol-q").stages(Unrounded()), images).logits
    assert 1e-3 < np.abs(np.asarray(integer) - np.asarray(teacher)).max() < 1  # golden README, fact 9: 0.21 at most


@pytest.mark.parametrize(
    "preset",
    [pytest.param("evol-q-omse", marks=pytest.mark.slow), pytest.param("fq-vit", marks=pytest.mark.slow), "evol-q"],
)
def test_an_image_has_the_same_logits_alone_and_in_a_batch_bit_for_bit(golden: Path, preset: str) -> None:
    stages = quantized(golden, preset).stages()
    images = small_images(golden)[1][:8]
    together = forward(stages, images)
    teacher = forward(small_model(golden).stages(), images).logits
    assert (np.asarray(together.logits) != np.asarray(teacher)).all()
    for i in (0, 3, 7):
        alone = forward(stages, images[i : i + 1])
        np.testing.assert_array_equal(alone.logits[0], together.logits[i])
        np.testing.assert_array_equal(alone.features[0], together.features[i])


def test_quantized_tensors_between_stages_are_codes(golden: Path) -> None:
    model = quantized(golden, "evol-q")
    x: Any = small_images(golden)[1][:4]
    for stage in model.stages()[:-1]:
        x = jax.jit(stage.function)(stage.state, x)
        steps = np.asarray(x.steps)
        np.testing.assert_array_equal(steps, np.round(steps))
        assert np.ptp(steps) <= 255
        assert x.scale.shape == (64,)


def test_blocks_share_one_stage_function_but_the_last_whose_tokens_are_not_all_read(golden: Path) -> None:
    functions = [stage.function for stage in quantized(golden, "evol-q").stages()]
    assert functions[1] == functions[2] != functions[3] and len(set(functions)) == 4


@pytest.mark.parametrize(
    "preset",
    [pytest.param("evol-q-omse", marks=pytest.mark.slow), pytest.param("fq-vit", marks=pytest.mark.slow), "evol-q"],
)
def test_tokens_that_the_head_does_not_read_change_nothing(golden: Path, preset: str) -> None:
    images = small_images(golden)[1][:4]
    read = forward(quantized(golden, preset).stages(), images)
    every = forward(quantized(golden, preset).stages(Simulated(all_tokens=True)), images)
    np.testing.assert_array_equal(read.logits, every.logits)
    float_stages = small_model(golden).stages()
    assert float_stages[1].function == small_model(golden).stage("blocks.0").function != float_stages[3].function


# The listing of sites

BLOCK = [
    ("norm1", "layer_norm"),
    ("attn.qkv.weight", "weight"),
    ("attn.qkv", "linear"),
    ("attn.query", "operand"),
    ("attn.key", "operand"),
    ("attn.value", "operand"),
    ("attn.scores", "matmul"),
    ("attn.softmax", "softmax"),
    ("attn.context", "matmul"),
    ("attn.proj.weight", "weight"),
    ("attn.proj", "linear"),
    ("residual1", "add"),
    ("norm2", "layer_norm"),
    ("mlp.fc1.weight", "weight"),
    ("mlp.fc1", "hidden"),
    ("mlp.gelu", "gelu"),
    ("mlp.fc2.weight", "weight"),
    ("mlp.fc2", "linear"),
    ("residual2", "add"),
]


def test_the_sites_of_a_vit_are_listed_in_the_order_they_are_reached() -> None:
    config = ViTConfig(image_size=16, patch_size=8, num_classes=5, width=8, depth=2, heads=2)
    sites = sites_of(Architecture("two", VIT, config, Preprocessing(image_size=16)))
    assert [(site.name, site.kind) for site in sites] == [
        ("embed.input", "image"),
        ("embed.proj.weight", "weight"),
        ("embed.proj", "linear"),
        ("embed.tokens", "tensor"),
        ("embed.pos_embed", "tensor"),
        ("embed.sum", "add"),
        *((f"blocks.0.{name}", kind) for name, kind in BLOCK),
        *((f"blocks.1.{name}", kind) for name, kind in BLOCK),
        ("head.norm", "layer_norm"),
        ("head.fc.weight", "weight"),
        ("head.fc", "linear"),
    ]
    shapes = {site.name: site.shape for site in sites}
    assert shapes["embed.input"] == (1, 16, 16, 3)
    assert shapes["embed.proj.weight"] == (192, 8)
    assert shapes["blocks.0.attn.qkv.weight"] == (8, 24)
    assert shapes["blocks.0.attn.query"] == (1, 2, 5, 4)
    assert shapes["blocks.0.attn.scores"] == (1, 2, 5, 5)
    assert shapes["blocks.1.mlp.gelu"] == (1, 5, 32)
    assert shapes["head.fc"] == (1, 5)


def test_listing_traces_and_does_not_compute() -> None:
    def stage(ops: FakeQuant, x: Tensor) -> Tensor:
        assert isinstance(x.steps, jax.core.Tracer)
        return ops.gelu("act", ops.linear("fc", jnp.zeros((1024, 4)), None, x, hidden=True))

    abstract = Tensor(jax.ShapeDtypeStruct((2, 1024), jnp.float32))  # type: ignore[arg-type]
    sites, output = list_sites(stage, "s", abstract)
    assert [(site.name, site.kind, site.shape) for site in sites] == [
        ("s.fc.weight", "weight", (1024, 4)),
        ("s.fc", "hidden", (2, 4)),
        ("s.act", "gelu", (2, 4)),
    ]
    assert output.steps.shape == (2, 4)


_Emit = Callable[[FakeQuant, Tensor], Tensor]
EMITTERS: dict[str, _Emit] = {
    "tensor": lambda ops, x: ops.tensor("s", x),
    "linear": lambda ops, x: ops.linear("s", jnp.eye(4), None, x),
    "hidden": lambda ops, x: ops.linear("s", jnp.eye(4), None, x, hidden=True),
    "matmul": lambda ops, x: ops.matmul("s", x, Tensor(jnp.eye(4))),
    "gelu": lambda ops, x: ops.gelu("s", x),
    "softmax": lambda ops, x: ops.softmax("s", x),
    "layer_norm": lambda ops, x: ops.layer_norm("s", jnp.ones(4), jnp.zeros(4), 1e-6, x),
    "add": lambda ops, x: ops.add("s", x, x),
}


@pytest.mark.parametrize("operation", EMITTERS)
def test_every_operation_quantizes_its_result_where_its_site_is_quantized(operation: str) -> None:
    x = Tensor(jnp.asarray(normal(1, 3, 4)))
    quantizer = uniform(0.25, 8.0, 0, 15)
    exact = EMITTERS[operation](Float(), x)
    found = EMITTERS[operation](FakeQuant({"s": quantizer}), x)
    assert exact.scale is None
    np.testing.assert_array_equal(found.steps, quantizer.steps(exact.values))
    assert found.scale is quantizer.scale


def test_matmul_with_a_scale_a_head_is_exact_in_steps() -> None:
    a, b = normal(0, 2, 3, 4, 8), normal(1, 2, 3, 8, 5)
    scale_a, scale_b = (np.asarray(s, np.float32).reshape(3, 1, 1) for s in ((0.1, 0.2, 0.3), (0.05, 0.3, 0.1)))
    ops = FakeQuant({"a": uniform(scale_a, 0.0, -8, 7), "b": uniform(scale_b, 0.0, -8, 7)})
    found = ops.matmul("y", ops.operand("a", Tensor(jnp.asarray(a))), ops.operand("b", Tensor(jnp.asarray(b))), 0.5)
    steps = [np.clip(np.round(x / s), -8, 7) for x, s in ((a, scale_a), (b, scale_b))]
    # Integers, so the sums are exact; three float32 products follow.
    expected = (steps[0].astype(np.float64) @ steps[1]) * (0.5 * scale_a.astype(np.float64) * scale_b)
    np.testing.assert_allclose(found.values, expected, rtol=4e-7)


def test_linear_with_a_weight_scale_for_each_part_of_the_outputs() -> None:
    x, kernel = normal(0, 2, 3, 4), normal(1, 4, 6)
    scale = np.asarray([0.1, 0.3], np.float32)
    ops = FakeQuant({"fc.weight": uniform(scale, 0.0, -8, 7)})
    found = ops.linear("fc", jnp.asarray(kernel), None, Tensor(jnp.asarray(x)))
    each = np.repeat(scale, 3)
    np.testing.assert_allclose(found.values, x @ (np.clip(np.round(kernel / each), -8, 7) * each), rtol=1e-4, atol=1e-6)
