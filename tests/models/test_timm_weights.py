"""timm's tensors in and out: nothing lost, nothing guessed."""

from dataclasses import replace
from functools import lru_cache
from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cptv_jax.errors import InputError
from cptv_jax.models.architecture import Architecture, abstract_weights
from cptv_jax.models.preprocessing import Preprocessing
from cptv_jax.models.timm_weights import from_timm, key_table, to_timm
from cptv_jax.models.vit import ViTConfig
from cptv_jax.models.vit_family import VIT
from cptv_jax.models.zoo import ZOO


def make(config: ViTConfig, name: str = "reduced") -> Architecture:
    return Architecture(name, VIT, config, Preprocessing(image_size=config.image_size))


def shapes(config: ViTConfig) -> dict[str, tuple[int, ...]]:
    """timm's state_dict, written down from timm's source."""
    width, hidden, side = config.width, int(config.width * config.mlp_ratio), config.patch_size
    tokens = (config.image_size // side) ** 2 + 1 + config.distilled
    found: dict[str, tuple[int, ...]] = {
        "cls_token": (1, 1, width),
        "pos_embed": (1, tokens, width),
        "patch_embed.proj.weight": (width, config.in_channels, side, side),
        "patch_embed.proj.bias": (width,),
        "norm.weight": (width,),
        "norm.bias": (width,),
        "head.weight": (config.num_classes, width),
        "head.bias": (config.num_classes,),
    }
    if config.distilled:
        found |= {
            "dist_token": (1, 1, width),
            "head_dist.weight": (config.num_classes, width),
            "head_dist.bias": (config.num_classes,),
        }
    for i in range(config.depth):
        for norm in ("norm1", "norm2"):
            found |= {f"blocks.{i}.{norm}.weight": (width,), f"blocks.{i}.{norm}.bias": (width,)}
        for layer, outputs, inputs in (
            ("attn.qkv", 3 * width, width), ("attn.proj", width, width), ("mlp.fc1", hidden, width),
            ("mlp.fc2", width, hidden),
        ):  # fmt: skip
            found[f"blocks.{i}.{layer}.weight"] = (outputs, inputs)
            if layer != "attn.qkv" or config.qkv_bias:
                found[f"blocks.{i}.{layer}.bias"] = (outputs,)
    return found


def random_tensors(config: ViTConfig) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {key: rng.normal(size=shape).astype(np.float32) for key, shape in shapes(config).items()}


def check_round_trip(architecture: Architecture) -> None:
    tensors = random_tensors(architecture.config)
    weights = from_timm(tensors, architecture, "test")
    found = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), weights)
    assert found == jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), abstract_weights(architecture))
    back = to_timm(weights, architecture)
    assert back.keys() == tensors.keys()
    for key, tensor in tensors.items():
        assert back[key].dtype == np.float32 and back[key].flags.c_contiguous
        np.testing.assert_array_equal(back[key], tensor, err_msg=key)


@st.composite
def configs(draw: st.DrawFn) -> ViTConfig:
    patch, heads = draw(st.integers(1, 5)), draw(st.integers(1, 3))
    return ViTConfig(
        image_size=patch * draw(st.integers(1, 4)),
        patch_size=patch,
        in_channels=draw(st.integers(1, 4)),
        num_classes=draw(st.integers(1, 6)),
        width=heads * draw(st.integers(1, 4)),
        depth=draw(st.integers(0, 3)),
        heads=heads,
        mlp_ratio=draw(st.sampled_from([1.0, 2.5, 4.0])),
        qkv_bias=draw(st.booleans()),
        distilled=draw(st.booleans()),
    )


@settings(deadline=None, max_examples=10)
@given(config=configs())
def test_tensors_of_any_size_survive_the_round_trip(config: ViTConfig) -> None:
    check_round_trip(make(config))


@pytest.mark.parametrize("name", [name for name, architecture in ZOO.items() if architecture.family is VIT])
def test_every_zoo_model_survives_the_round_trip_at_reduced_size(name: str) -> None:
    config = ZOO[name].config
    reduced = replace(config, image_size=config.patch_size * 2, width=config.heads * 2, depth=2, num_classes=7)
    check_round_trip(make(reduced))


SMALL = make(ViTConfig(image_size=8, patch_size=4, num_classes=3, width=4, depth=2, heads=2), "small_vit")


def test_tensors_go_to_the_places_that_their_names_say() -> None:
    tensors = random_tensors(SMALL.config)
    weights: Any = from_timm(tensors, SMALL, "test")
    np.testing.assert_array_equal(weights["blocks.1"]["attn"]["qkv"]["kernel"], tensors["blocks.1.attn.qkv.weight"].T)
    np.testing.assert_array_equal(weights["blocks.0"]["mlp"]["fc2"]["bias"], tensors["blocks.0.mlp.fc2.bias"])
    np.testing.assert_array_equal(weights["blocks.0"]["norm2"]["weight"], tensors["blocks.0.norm2.weight"])
    np.testing.assert_array_equal(weights["head"]["fc"]["kernel"], tensors["head.weight"].T)
    np.testing.assert_array_equal(weights["head"]["norm"]["bias"], tensors["norm.bias"])
    convolution, kernel = tensors["patch_embed.proj.weight"], np.asarray(weights["embed"]["proj"]["kernel"])
    for row, column, channel in ((0, 0, 0), (1, 2, 0), (3, 1, 2)):
        place = (row * 4 + column) * 3 + channel
        np.testing.assert_array_equal(kernel[place], convolution[:, channel, row, column])


def test_float64_tensors_become_float32() -> None:
    tensors = {key: tensor.astype(np.float64) for key, tensor in random_tensors(SMALL.config).items()}
    assert {leaf.dtype for leaf in jax.tree.leaves(from_timm(tensors, SMALL, "test"))} == {np.dtype(np.float32)}


@lru_cache
def keys() -> tuple[str, ...]:
    return tuple(entry.key for entry in key_table(SMALL))


def refusal(tensors: dict[str, np.ndarray]) -> str:
    with pytest.raises(InputError) as caught:
        from_timm(tensors, SMALL, "weights.npz")
    message = str(caught.value)
    assert "weights.npz" in message and "small_vit" in message and "--arch" in message and "\n" not in message
    return message


@settings(deadline=None, max_examples=30)
@given(key=st.sampled_from(keys()))
def test_a_missing_tensor_is_named(key: str) -> None:
    tensors = random_tensors(SMALL.config)
    del tensors[key]
    assert f"lacks '{key}'" in refusal(tensors)


@settings(deadline=None, max_examples=30)
@given(key=st.sampled_from(keys()))
def test_a_tensor_of_another_shape_is_named_with_both_shapes(key: str) -> None:
    tensors = random_tensors(SMALL.config)
    shape = tensors[key].shape
    tensors[key] = np.zeros((*shape, 1), np.float32)
    message = refusal(tensors)
    assert f"'{key}'" in message and str((*shape, 1)) in message and str(shape) in message


def test_a_transposed_linear_layer_is_refused() -> None:
    tensors = random_tensors(SMALL.config)
    tensors["blocks.0.mlp.fc1.weight"] = tensors["blocks.0.mlp.fc1.weight"].T
    assert "'blocks.0.mlp.fc1.weight' has shape (4, 16), but small_vit needs (16, 4)" in refusal(tensors)


def test_an_unknown_tensor_is_named() -> None:
    tensors = random_tensors(SMALL.config) | {"blocks.0.attn.q_norm.weight": np.zeros(2, np.float32)}
    assert "has 'blocks.0.attn.q_norm.weight', which small_vit does not know" in refusal(tensors)


def test_many_wrong_keys_are_counted_not_listed() -> None:
    message = refusal({"a": np.zeros(1, np.float32)})
    assert f"and {len(keys()) - 3} more" in message
    assert len(message) < 300


def test_weights_of_a_deeper_model_are_refused() -> None:
    message = refusal(random_tensors(replace(SMALL.config, depth=3)))
    assert "'blocks.2." in message


def test_initialized_weights_have_the_abstract_shapes_and_go_out_under_timm_s_keys() -> None:
    weights = SMALL.initialize(0)
    assert jax.tree.map(lambda leaf: leaf.shape, weights) == jax.tree.map(
        lambda leaf: leaf.shape, abstract_weights(SMALL)
    )
    assert {key: tensor.shape for key, tensor in to_timm(weights, SMALL).items()} == shapes(SMALL.config)
    again, other = SMALL.initialize(0), SMALL.initialize(1)
    kernels = [np.asarray(w["blocks.0"]["attn"]["qkv"]["kernel"]) for w in (weights, again, other)]
    np.testing.assert_array_equal(kernels[0], kernels[1])
    assert (kernels[0] != kernels[2]).any()
    assert (kernels[0] != np.asarray(weights["blocks.1"]["attn"]["qkv"]["kernel"])).any()
