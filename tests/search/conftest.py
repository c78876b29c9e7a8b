"""Two models for the search's tests: a toy of three unlike stages, and a small quantized ViT on real digits."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from searches import LOSS

from cptv_jax.methods.registry import METHODS
from cptv_jax.models.architecture import Architecture, sites_of
from cptv_jax.models.preprocessing import Preprocessing
from cptv_jax.models.timm_weights import from_timm
from cptv_jax.models.vit import ViTConfig
from cptv_jax.models.vit_family import VIT
from cptv_jax.quantized.candidate import Space
from cptv_jax.quantized.model import Model, QuantizedModel
from cptv_jax.recipe.resolve import RecipeConfig, resolve
from cptv_jax.runtime.forward import forward
from cptv_jax.runtime.stages import Output, Stage
from cptv_jax.search import Evaluator


@dataclass(frozen=True)
class Subject:
    """What an evaluator needs. teacher_stages: of the float model. images: before they are cut into batches."""

    stages: tuple[Stage, ...]
    teacher_stages: tuple[Stage, ...]
    images: np.ndarray

    def batches(self, batch: int) -> list[np.ndarray]:
        """All images, in batches."""
        return [self.images[i : i + batch] for i in range(0, len(self.images), batch)]

    def teacher(self, batch: int) -> list[Output]:
        return [forward(self.teacher_stages, images) for images in self.batches(batch)]


# ---- the toy --------------------------------------------------------------------------------------------------------
# A hierarchy as Swin and LeViT have it: tokens are merged and widened between stages, which take and return different
# shapes and pytrees. As in the package, matmuls are of integers, so that their sums do not depend on their order.


def _product(steps: jax.Array, kernel: jax.Array, scale: jax.Array | None) -> jax.Array:
    """Integer steps times a kernel, which is float where it has no scale."""
    if scale is None:
        return steps @ kernel
    return (steps @ jnp.clip(jnp.round(kernel / scale), -7, 7)) * scale


@dataclass(frozen=True)
class Patches:
    """Images [batch, 8, 8, 1] -> {"tokens": [batch, 16, 6]}."""

    def __call__(self, state: Any, x: jax.Array) -> Any:
        patches = x.reshape(-1, 4, 2, 4, 2).transpose(0, 1, 3, 2, 4).reshape(-1, 16, 4)
        return {"tokens": _product(jnp.round(patches * 16), state["kernel"], state["scale"]) / 16}


@dataclass(frozen=True)
class Merge:
    """{"tokens": [batch, 16, 6]} -> tokens [batch, 4, 10], four tokens made one."""

    merged: int = 4

    def __call__(self, state: Any, x: Any) -> jax.Array:
        tokens = x["tokens"].reshape(-1, 16 // self.merged, 6 * self.merged)
        steps = jnp.clip(jnp.round(tokens / state["input"]["scale"]), -2048, 2047)
        return jax.nn.relu(_product(steps, state["kernel"], state["weight"]["scale"]) * state["input"]["scale"])


@dataclass(frozen=True)
class Classify:
    """Tokens [batch, 4, 10] -> Output with 10 features and 5 logits."""

    def __call__(self, state: Any, x: jax.Array) -> Output:
        features = jnp.max(x, 1)
        return Output(features, _product(jnp.round(features * 16), state["kernel"], state["scale"]) / 16)


def bind_patches(state: Any, candidate: Any) -> Any:
    return {**state, "scale": candidate["weight"]}


def bind_merge(state: Any, candidate: Any) -> Any:
    return {**state, "weight": {"scale": candidate["weight"]["scale"]}, "input": {"scale": candidate["input"]}}


def bind_classify(state: Any, candidate: Any) -> Any:
    return {**state, "scale": candidate["per_tensor"]}


@pytest.fixture(scope="session")
def make_toy() -> Callable[..., Subject]:
    """make_toy(searched): the toy with candidates at the named stages."""

    def make(searched: Sequence[str] = ("patches", "merge", "head"), images: int = 24) -> Subject:
        rng = np.random.default_rng(0)

        def normal(*shape: int) -> jax.Array:
            return jnp.asarray(rng.normal(size=shape), jnp.float32)

        patches = {"kernel": normal(4, 6), "scale": jnp.full(6, 0.4, jnp.float32)}
        merge: dict[str, Any] = {
            "kernel": normal(24, 10),
            "weight": {"scale": jnp.full(10, 0.5, jnp.float32)},
            "input": {"scale": jnp.float32(0.2)},
        }
        head = {"kernel": normal(10, 5), "scale": jnp.float32(0.6)}
        candidates: dict[str, Any] = {
            "patches": {"weight": patches["scale"]},
            "merge": {"weight": {"scale": merge["weight"]["scale"]}, "input": merge["input"]["scale"]},
            "head": {"per_tensor": head["scale"]},
        }
        candidates = {name: value if name in searched else None for name, value in candidates.items()}
        stages = (
            Stage("patches", Patches(), patches, candidates["patches"], bind_patches),
            Stage("merge", Merge(), merge, candidates["merge"], bind_merge),
            Stage("head", Classify(), head, candidates["head"], bind_classify),
        )
        exact = (
            Stage("patches", Patches(), {**patches, "scale": None}),
            Stage("merge", Merge(), {**merge, "weight": {"scale": None}, "input": {"scale": jnp.float32(1 / 256)}}),
            Stage("head", Classify(), {**head, "scale": None}),
        )
        return Subject(stages, exact, rng.normal(size=(images, 8, 8, 1)).astype(np.float32))

    return make


@pytest.fixture(scope="session")
def toy(make_toy: Callable[..., Subject]) -> Subject:
    return make_toy()


# ---- the ViT --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def vit_model(golden: Path) -> tuple[QuantizedModel, np.ndarray]:
    """The golden ViT at 4-bit weights, and 50 real images."""
    config = ViTConfig(image_size=32, patch_size=8, num_classes=10, width=64, depth=3, heads=4)
    architecture = Architecture("small", VIT, config, Preprocessing(image_size=32))
    with np.load(golden / "model.npz") as file:
        model = Model(architecture, from_timm(dict(file), architecture, "model.npz"))
    with np.load(golden / "data.npz") as file:
        images = file["calib_images"].transpose(0, 2, 3, 1)
    recipe = resolve(RecipeConfig(preset="evol-q", weight_bits=4), sites_of(architecture))
    calibration = [jnp.asarray(images[:32]), jnp.asarray(images[32:64])]
    return METHODS["fq-vit"].quantize(model, calibration, recipe, jax.random.key(0)), images[:50]


@pytest.fixture(scope="session")
def make_vit(vit_model: tuple[QuantizedModel, np.ndarray]) -> Callable[[Sequence[str]], Subject]:
    """make_vit(sites): its stages embed, blocks.0 to 2 and head; blocks are searched at those sites."""
    quantized, images = vit_model

    def make(sites: Sequence[str]) -> Subject:
        searched = [s for s in quantized.quantizers if s.startswith("blocks.") and s.split(".", 2)[2] in sites]
        stages = quantized.stages(space=Space(searched))
        return Subject(stages, quantized.model.stages(), images)

    return make


@pytest.fixture(scope="session")
def vit(make_vit: Callable[[Sequence[str]], Subject]) -> Subject:
    """With the published sites: the weights of the attention."""
    return make_vit(("attn.qkv.weight", "attn.proj.weight"))


@pytest.fixture(scope="module")
def make_evaluator(toy: Subject) -> Callable[..., Evaluator]:
    """make_evaluator(): a new evaluator of the toy as it was before any search."""
    batches, teacher = toy.batches(24), toy.teacher(24)
    return lambda stages=toy.stages: Evaluator(stages, batches, teacher, LOSS, 12, 2)
