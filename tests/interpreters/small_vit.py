"""A small trained ViT from tests/golden, quantized, for tests of interpreters."""

from functools import lru_cache
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from cptv_jax.calibration.statistics import calibrate
from cptv_jax.models.architecture import Architecture, sites_of
from cptv_jax.models.preprocessing import Preprocessing
from cptv_jax.models.timm_weights import from_timm
from cptv_jax.models.vit import ViTConfig
from cptv_jax.models.vit_family import VIT
from cptv_jax.quantized.model import Model, QuantizedModel
from cptv_jax.quantizers import Uniform
from cptv_jax.recipe.resolve import RecipeConfig, resolve

SMALL = Architecture(
    "small", VIT, ViTConfig(image_size=32, patch_size=8, num_classes=10, width=64, depth=3, heads=4),
    Preprocessing(image_size=32),
)  # fmt: skip
RNG = np.random.default_rng


def uniform(scale: Any, zero_point: float = 0.0, low: float = 0.0, high: float = 255.0) -> Uniform:
    return Uniform(*(jnp.asarray(a, jnp.float32) for a in (scale, zero_point, low, high)))


def normal(seed: int, *shape: int) -> np.ndarray:
    return RNG(seed).normal(size=shape).astype(np.float32)


@lru_cache
def small_model(folder: Path) -> Model:
    with np.load(folder / "model.npz") as file:
        return Model(SMALL, from_timm(dict(file), SMALL, "model.npz"))


@lru_cache
def small_images(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Calibration and test images, channels last."""
    with np.load(folder / "data.npz") as file:
        return file["calib_images"].transpose(0, 2, 3, 1), file["test_images"].transpose(0, 2, 3, 1)


@lru_cache
def quantized(folder: Path, preset: str) -> QuantizedModel:
    model = small_model(folder)
    recipe = resolve(RecipeConfig(preset=preset, weight_bits=4), sites_of(SMALL))
    images = small_images(folder)[0]
    return QuantizedModel(model, recipe, calibrate(model, [images[:8], images[8:16]], recipe))
