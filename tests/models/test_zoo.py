"""Known models: names, sizes, preprocessing."""

import math

import jax
import pytest

from cptv_jax.errors import InputError
from cptv_jax.models.architecture import Architecture, abstract_weights
from cptv_jax.models.preprocessing import Preprocessing
from cptv_jax.models.timm_weights import key_table
from cptv_jax.models.vit import ViTConfig
from cptv_jax.models.vit_family import VIT
from cptv_jax.models.zoo import ZOO, architecture_named, guess_architecture

# Counted with timm 1.0.31: sum(p.numel() for p in timm.create_model(name).parameters()).
PARAMETERS = {
    "deit_tiny_patch16_224": 5_717_416,
    "deit_small_patch16_224": 22_050_664,
    "deit_base_patch16_224": 86_567_656,
    "deit_tiny_distilled_patch16_224": 5_910_800,
    "deit_small_distilled_patch16_224": 22_436_432,
    "deit_base_distilled_patch16_224": 87_338_192,
    "vit_tiny_patch16_224": 5_717_416,
    "vit_small_patch16_224": 22_050_664,
    "vit_base_patch16_224": 86_567_656,
    "vit_large_patch16_224": 304_326_632,
}
TENSORS = {"vit_large": 296, "distilled": 155}  # of len(timm's state_dict); 152 for the others


def vits() -> dict[str, Architecture]:
    return {name: architecture for name, architecture in ZOO.items() if architecture.family is VIT}


def test_every_vit_is_counted_here() -> None:
    assert vits().keys() == PARAMETERS.keys()


@pytest.mark.parametrize("name", PARAMETERS)
def test_models_have_the_published_number_of_parameters(name: str) -> None:
    weights = abstract_weights(ZOO[name])
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(weights)) == PARAMETERS[name]


@pytest.mark.parametrize("name", PARAMETERS)
def test_the_key_table_covers_each_parameter_exactly_once(name: str) -> None:
    table = key_table(ZOO[name])
    keys = [entry.key for entry in table]
    places = [(entry.stage, *entry.path) for entry in table]
    assert len(set(keys)) == len(keys) == next((n for part, n in TENSORS.items() if part in name), 152)
    assert len(set(places)) == len(places)
    leaves = jax.tree_util.tree_leaves_with_path(abstract_weights(ZOO[name]))
    sizes = {tuple(key.key for key in path): math.prod(leaf.shape) for path, leaf in leaves}
    assert {place: math.prod(entry.shape) for place, entry in zip(places, table, strict=True)} == sizes


@pytest.mark.parametrize("name", PARAMETERS)
def test_sizes_and_preprocessing_are_those_of_the_published_model(name: str) -> None:
    width, depth, heads = {
        "tiny": (192, 12, 3), "small": (384, 12, 6), "base": (768, 12, 12), "large": (1024, 24, 16),
    }[name.split("_")[1]]  # fmt: skip
    distilled = "distilled" in name
    config = ZOO[name].config
    assert config == ViTConfig(
        image_size=224, patch_size=16, in_channels=3, num_classes=1000, width=width, depth=depth, heads=heads,
        mlp_ratio=4.0, qkv_bias=True, layer_norm_epsilon=1e-6, distilled=distilled,
    )  # fmt: skip
    assert (config.num_patches, config.num_tokens, config.hidden) == (196, 198 if distilled else 197, 4 * width)
    statistics: tuple[tuple[float, ...], tuple[float, ...]] = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    if name.startswith("vit"):
        statistics = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    assert ZOO[name].preprocessing == Preprocessing(224, 0.9, "bicubic", *statistics)


def test_a_zoo_key_is_the_architecture_s_own_name() -> None:
    assert all(architecture.name == name for name, architecture in ZOO.items())


# Names


def test_a_pretraining_tag_is_ignored() -> None:
    for name in ("vit_base_patch16_224", "vit_base_patch16_224.augreg2_in21k_ft_in1k"):
        assert architecture_named(name) is ZOO["vit_base_patch16_224"]
    assert architecture_named("deit_tiny_patch16_224.fb_in1k") is ZOO["deit_tiny_patch16_224"]


@pytest.mark.parametrize("name", ["deit_tiny_patch16", "deit-tiny-patch16-224", "deit_tinny_patch16_224.fb_in1k"])
def test_an_unknown_name_is_refused_with_the_nearest(name: str) -> None:
    with pytest.raises(InputError) as caught:
        architecture_named(name)
    assert f"'{name}'" in str(caught.value)
    assert "did you mean 'deit_tiny_patch16_224'?" in str(caught.value)


@pytest.mark.parametrize(
    "source, name",
    [
        ("weights/deit_tiny_patch16_224.safetensors", "deit_tiny_patch16_224"),
        ("/a/b/my_deit_small_patch16_224-cd65a155.pth", "deit_small_patch16_224"),
        ("timm/deit_tiny_distilled_patch16_224.fb_in1k", "deit_tiny_distilled_patch16_224"),
        ("hf_hub:timm/vit_base_patch16_224.augreg2_in21k_ft_in1k", "vit_base_patch16_224"),
        ("timm/vit_large_patch16_224.augreg_in21k_ft_in1k", "vit_large_patch16_224"),
        # Where several names occur, the longest wins.
        ("from_deit_tiny_patch16_224/deit_tiny_distilled_patch16_224.pth", "deit_tiny_distilled_patch16_224"),
    ],
)
def test_the_architecture_is_guessed_from_a_file_name_or_hub_id(source: str, name: str) -> None:
    assert guess_architecture(source) is ZOO[name]


@pytest.mark.parametrize("source", ["weights.safetensors", "timm/vit_base_patch32_224.augreg_in1k", ""])
def test_what_names_no_known_architecture_is_refused_with_the_way_out(source: str) -> None:
    with pytest.raises(InputError) as caught:
        guess_architecture(source)
    message = str(caught.value)
    assert f"'{source}'" in message and "--arch" in message and "deit_tiny_patch16_224" in message


def test_what_is_no_family_is_refused() -> None:
    with pytest.raises(InputError, match=r"x: family is 'vitt', but must be a Family.*; did you mean 'vit'"):
        Architecture("x", "vitt", ViTConfig(), Preprocessing())  # type: ignore[arg-type]


def test_sizes_of_another_family_are_refused() -> None:
    with pytest.raises(InputError, match="x: its sizes are a dict, but the models of family vit have a ViTConfig"):
        Architecture("x", VIT, {"width": 3}, Preprocessing())
