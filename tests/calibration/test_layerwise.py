"""What layers read, produce and matter for is what the float model's own forward and backward pass say."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_vit import SMALL, images, small_model

from cptv_jax.calibration.layerwise import Layer, float_stage_inputs, layers, operations
from cptv_jax.models.architecture import sites_of
from cptv_jax.quantized.model import Model
from cptv_jax.runtime.stages import Output

EVERY = [site.name for site in sites_of(SMALL)]


@pytest.fixture(scope="module")
def walked(golden: Path) -> tuple[dict[str, Layer], np.ndarray]:
    """All layers of the digits model with gradients of a random linear loss, on two chunks of three images."""
    model, some = small_model(golden), images(golden)[:6]
    inputs, outputs = float_stage_inputs(model, [jnp.asarray(some[:3]), jnp.asarray(some[3:])])
    slope = np.random.default_rng(0).normal(size=(6, 10)).astype(np.float32)
    gradients = [
        Output(jnp.zeros_like(output.features), jnp.asarray(slope[i : i + 3]))
        for i, output in zip((0, 3), outputs, strict=True)
    ]
    return {layer.name: layer for layer in layers(model, inputs, gradients, EVERY)}, slope


def whole(layer: Layer, name: str) -> np.ndarray:
    return np.concatenate([np.asarray(getattr(samples, name)) for samples in layer.samples])


@pytest.mark.slow
def test_every_linear_layer_and_matmul_comes_once_last_stage_first(walked: tuple[dict[str, Layer], np.ndarray]) -> None:
    found, _ = walked
    in_block = ["attn.qkv", "attn.scores", "attn.context", "attn.proj", "mlp.fc1", "mlp.fc2"]
    blocks = [f"blocks.{i}.{name}" for i in (2, 1, 0) for name in in_block]
    assert list(found) == ["head.fc", *blocks, "embed.proj"]
    assert found["blocks.1.attn.context"].sites == ("blocks.1.attn.softmax", "blocks.1.attn.value")
    assert found["blocks.1.mlp.fc2"].sites == ("blocks.1.mlp.gelu", "blocks.1.mlp.fc2.weight")


def test_only_layers_with_a_quantized_operand_come(golden: Path) -> None:
    model = small_model(golden)
    wanted = ["blocks.1.attn.value", "blocks.0.mlp.fc1.weight"]
    assert [site.name for site in operations(model, wanted)] == ["blocks.0.mlp.fc1.weight", "blocks.1.attn.context"]
    inputs, _ = float_stage_inputs(model, [jnp.asarray(images(golden)[:2])])
    found = list(layers(model, inputs, None, wanted))
    assert [layer.name for layer in found] == ["blocks.1.attn.context", "blocks.0.mlp.fc1"]
    assert all(samples.gradient is None for layer in found for samples in layer.samples)


def test_operands_give_the_output(walked: tuple[dict[str, Layer], np.ndarray]) -> None:
    for layer in walked[0].values():
        for samples in layer.samples:
            if layer.operation.weight is None:
                a, b = (np.asarray(x, np.float64) for x in samples.operands)
                expected = float(layer.operation.factor) * (a @ b)
            else:
                kernel, bias = (np.asarray(x, np.float64) for x in layer.operation.weight)
                expected = np.asarray(samples.operands[0], np.float64) @ kernel + bias
            # float32 sums of up to 256 products.
            np.testing.assert_allclose(samples.output, expected, rtol=1e-4, atol=1e-5, err_msg=layer.name)


@pytest.mark.slow
def test_gradients_of_outputs_are_those_of_the_whole_model(
    golden: Path, walked: tuple[dict[str, Layer], np.ndarray]
) -> None:
    """A kernel's gradient is its inputs times the gradients of its outputs; a bias's is their sum."""
    found, slope = walked
    model, some = small_model(golden), jnp.asarray(images(golden)[:6])

    def loss(weights: dict[str, Any]) -> jax.Array:
        x: Any = some
        for stage in Model(SMALL, weights).stages():
            x = stage.function(stage.state, x)
        return jnp.sum(x.logits * slope)

    with jax.default_matmul_precision("highest"):
        gradients = Model(SMALL, jax.grad(loss)(model.weights))
    for layer in found.values():
        if not layer.is_linear:
            continue
        expected = gradients.layer(layer.name)
        x, g = np.concatenate([samples.operands[0] for samples in layer.samples]), whole(layer, "gradient")
        x, g = x.reshape(-1, x.shape[-1]).astype(np.float64), g.reshape(-1, g.shape[-1]).astype(np.float64)
        scale = np.abs(expected["kernel"]).max()
        np.testing.assert_allclose(x.T @ g, expected["kernel"], atol=1e-5 * scale, err_msg=layer.name)
        np.testing.assert_allclose(g.sum(0), expected["bias"], atol=1e-5 * np.abs(expected["bias"]).max())


def test_gradients_of_matmuls_pass_on_to_their_operands(walked: tuple[dict[str, Layer], np.ndarray]) -> None:
    """Through softmax from the context's gradient to the scores'."""
    found, _ = walked
    context, scores = found["blocks.1.attn.context"], found["blocks.1.attn.scores"]
    attention, value = (np.concatenate([np.asarray(s.operands[i]) for s in context.samples]) for i in (0, 1))
    upstream = whole(context, "gradient") @ value.swapaxes(-1, -2)
    expected = attention * (upstream - np.sum(attention * upstream, -1, keepdims=True))
    np.testing.assert_allclose(whole(scores, "gradient"), expected, atol=1e-5 * np.abs(expected).max())
