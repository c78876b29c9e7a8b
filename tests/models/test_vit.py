"""The float forward pass against arrays made by timm."""

from functools import lru_cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from cptv_jax.interpreters import Float, Tensor
from cptv_jax.models.architecture import Architecture
from cptv_jax.models.preprocessing import Preprocessing
from cptv_jax.models.timm_weights import from_timm
from cptv_jax.models.vit import VisionTransformer, ViTConfig
from cptv_jax.models.vit_family import VIT
from cptv_jax.models.weight_files import read_weights
from cptv_jax.models.zoo import ZOO
from cptv_jax.quantized.execution import FullPrecision
from cptv_jax.quantized.model import Model
from cptv_jax.runtime.forward import apply_stage, forward, stage_inputs


def channels_last(images: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(images.transpose(0, 2, 3, 1))


def arrays_of(path: Path) -> dict[str, np.ndarray]:
    with np.load(path) as file:
        return dict(file)


# The small ViT of the golden arrays

SMALL = Architecture(
    "small", VIT, ViTConfig(image_size=32, patch_size=8, num_classes=10, width=64, depth=3, heads=4),
    Preprocessing(image_size=32),
)  # fmt: skip


def test_the_small_vit_has_timm_s_logits(golden: Path) -> None:
    data = arrays_of(golden / "data.npz")
    model = Model(SMALL, from_timm(arrays_of(golden / "model.npz"), SMALL, "model.npz"))
    found = forward(model.stages(), channels_last(data["test_images"]))
    # The published codes' own float passes differ from timm's by up to 4e-6 on these logits of order 10.
    np.testing.assert_allclose(found.logits, data["fp_logits_timm"], rtol=0, atol=1e-5)
    accuracy = np.mean(np.argmax(found.logits, -1) == data["test_labels"])
    assert round(100 * float(accuracy), 3) == 94.276


def test_stages_in_turn_are_the_whole_module(golden: Path) -> None:
    images = jnp.asarray(channels_last(arrays_of(golden / "data.npz")["test_images"][:2]))
    weights: Any = from_timm(arrays_of(golden / "model.npz"), SMALL, "model.npz")
    module = VisionTransformer(SMALL.config, rngs=nnx.Rngs(0))
    for name, stage in module.stages().items():
        nnx.update(stage, weights[name])
    assert tuple(module.stages()) == SMALL.stage_names == ("embed", "blocks.0", "blocks.1", "blocks.2", "head")
    graph, state = nnx.split(module)
    whole = jax.jit(lambda state, x: nnx.merge(graph, state)(Float(), Tensor(x)))(state, images)
    staged = forward(Model(SMALL, weights).stages(), images)
    # One program or five: XLA fuses differently, so sums round differently.
    np.testing.assert_allclose(staged.logits, whole.logits, rtol=0, atol=1e-5)
    assert staged.features.shape == (2, 64)


# A distilled DeiT. timm is not at hand where the tests run, so its arrays are stored: timm 1.0.31, torch 2.13.0 CPU,
#     VisionTransformerDistilled(img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=10).eval()
# with every parameter drawn from 0.15 * N(0, 1), LayerNorm weights around 1 (generator seed 0), and 4 images from
# N(0, 1). `features` are forward_features(images)[:, :2], `head_logits` and `head_dist_logits` head and head_dist of
# them, `logits` the model's output, and `weights/*` its state_dict.

DISTILLED = Architecture(
    "distilled", VIT,
    ViTConfig(image_size=32, patch_size=8, num_classes=10, width=32, depth=2, heads=2, distilled=True),
    Preprocessing(image_size=32),
)  # fmt: skip


def test_a_distilled_deit_averages_its_two_heads_as_timm_does(golden: Path) -> None:
    arrays = arrays_of(golden / "distilled.npz")
    tensors = {key.removeprefix("weights/"): a for key, a in arrays.items() if key.startswith("weights/")}
    weights: Any = from_timm(tensors, DISTILLED, "distilled.npz")
    output = forward(Model(DISTILLED, weights).stages(), channels_last(arrays["images"]))
    # float32 on both sides, sums of up to 192 terms, values up to 3.
    np.testing.assert_allclose(output.logits, arrays["logits"], rtol=0, atol=1e-5)
    features = np.asarray(output.features).reshape(4, 2, 32)
    np.testing.assert_allclose(features, arrays["features"], rtol=0, atol=1e-5)
    for token, (layer, key) in enumerate((("fc", "head_logits"), ("fc_dist", "head_dist_logits"))):
        head = weights["head"][layer]
        logits = features[:, token] @ np.asarray(head["kernel"]) + np.asarray(head["bias"])
        np.testing.assert_allclose(logits, arrays[key], rtol=0, atol=1e-5)


def test_each_distilled_head_acts_alone_when_the_other_is_silenced(golden: Path) -> None:
    arrays = arrays_of(golden / "distilled.npz")
    tensors = {key.removeprefix("weights/"): a for key, a in arrays.items() if key.startswith("weights/")}
    for silenced, left in (("head_dist", "head_logits"), ("head", "head_dist_logits")):
        changed = {k: np.zeros_like(a) if k.startswith(f"{silenced}.") else a for k, a in tensors.items()}
        model = Model(DISTILLED, from_timm(changed, DISTILLED, "distilled.npz"))
        output = forward(model.stages(), channels_last(arrays["images"]))
        np.testing.assert_allclose(2 * np.asarray(output.logits), arrays[left], rtol=0, atol=1e-5)


# DeiT-Tiny with real weights and photographs

# Outputs of one stage, fed with timm's own input of it: float32 sums of up to 768 terms.
ONE_STAGE = 2e-5
TINY = ZOO["deit_tiny_patch16_224"]


@lru_cache
def tiny(shared: Path) -> tuple[Model, dict[str, np.ndarray]]:
    file = read_weights(str(shared / "weights" / "deit_tiny_patch16_224.safetensors"))
    return Model(TINY, from_timm(file.tensors, TINY, file.source)), arrays_of(shared / "golden" / "deit_tiny_float.npz")


def normalized(pixels: np.ndarray) -> np.ndarray:
    mean, std = (np.asarray(a, np.float32) for a in (TINY.preprocessing.mean, TINY.preprocessing.std))
    return (pixels.astype(np.float32) / np.float32(255) - mean) / std


@lru_cache
def tiny_inputs(shared: Path) -> dict[str, Any]:
    """The input of each stage of DeiT-Tiny, and "output", for the first three photographs."""
    model, arrays = tiny(shared)
    inputs = stage_inputs(model.stages(), normalized(arrays["pixels"][:3]))
    return dict(zip((*TINY.stage_names, "output"), inputs, strict=True))


def scale_of(expected: np.ndarray) -> float:
    return float(np.abs(expected).max())


@pytest.mark.slow
def test_deit_tiny_has_timm_s_logits(shared: Path) -> None:
    model, arrays = tiny(shared)
    logits = np.concatenate(
        [forward(model.stages(), normalized(arrays["pixels"][i : i + 3])).logits for i in range(0, 24, 3)]
    )
    # Twelve blocks of float32 on logits up to 15; other orders of summation differ by a few 1e-5.
    np.testing.assert_allclose(logits, arrays["logits"], rtol=0, atol=1e-4)


def test_deit_tiny_embeds_as_timm_does(shared: Path) -> None:
    _, arrays = tiny(shared)
    embedded = tiny_inputs(shared)["blocks.0"].values
    np.testing.assert_allclose(embedded, arrays["stage:pos_embed"], rtol=0, atol=ONE_STAGE)
    # What timm calls patch_embed is the same without the class token and the position embedding.
    position = np.asarray(tiny(shared)[0].weights["embed"]["pos_embed"])
    np.testing.assert_allclose((embedded - position)[:, 1:], arrays["stage:patch_embed"], rtol=0, atol=ONE_STAGE)


def test_the_first_block_of_deit_tiny_on_timm_s_input_is_timm_s(shared: Path) -> None:
    model, arrays = tiny(shared)
    stage = model.stages()[1]
    found = apply_stage(stage.function, stage.state, Tensor(jnp.asarray(arrays["stage:pos_embed"])))
    np.testing.assert_allclose(found.values, arrays["stage:blocks.0"], rtol=0, atol=ONE_STAGE)


@pytest.mark.parametrize("first, last", [("blocks.0", "blocks.5"), ("blocks.5", "blocks.11")])
def test_blocks_of_deit_tiny_on_timm_s_input_are_timm_s(shared: Path, first: str, last: str) -> None:
    model, arrays = tiny(shared)
    names = TINY.stage_names
    x: Any = Tensor(jnp.asarray(arrays[f"stage:{first}"]))
    for stage in model.stages(FullPrecision(all_tokens=True))[names.index(first) + 1 : names.index(last) + 1]:
        x = apply_stage(stage.function, stage.state, x)
    expected = arrays[f"stage:{last}"]
    # Five or six blocks; a token's few large channels carry errors of 2^-23 of their own size.
    np.testing.assert_allclose(x.values, expected, rtol=0, atol=3e-6 * scale_of(expected))


def test_the_head_of_deit_tiny_on_timm_s_input_is_timm_s(shared: Path) -> None:
    model, arrays = tiny(shared)
    head = model.stages()[-1]
    output = apply_stage(head.function, head.state, Tensor(jnp.asarray(arrays["stage:blocks.11"])))
    np.testing.assert_allclose(output.features, arrays["stage:norm"][:, 0], rtol=0, atol=ONE_STAGE)
    np.testing.assert_allclose(output.logits, arrays["logits"][:3], rtol=0, atol=ONE_STAGE)


def test_deit_tiny_s_features_are_timm_s_normalized_class_tokens(shared: Path) -> None:
    _, arrays = tiny(shared)
    features = tiny_inputs(shared)["output"].features
    # Through all twelve blocks, as for the logits.
    np.testing.assert_allclose(features, arrays["stage:norm"][:, 0], rtol=0, atol=1e-4)
