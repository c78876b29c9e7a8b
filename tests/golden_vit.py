"""The small ViT of the golden arrays, its images and recipes."""

from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from cptv_jax.models.architecture import Architecture, sites_of
from cptv_jax.models.preprocessing import Preprocessing
from cptv_jax.models.timm_weights import from_timm
from cptv_jax.models.vit import ViTConfig
from cptv_jax.models.vit_family import VIT
from cptv_jax.quantized.model import Model
from cptv_jax.recipe.resolve import RecipeConfig, resolve
from cptv_jax.recipe.spec import Recipe

SMALL = Architecture(
    "small", VIT, ViTConfig(image_size=32, patch_size=8, num_classes=10, width=64, depth=3, heads=4),
    Preprocessing(image_size=32),
)  # fmt: skip


@lru_cache
def small_model(folder: Path) -> Model:
    with np.load(folder / "model.npz") as file:
        return Model(SMALL, from_timm(dict(file), SMALL, "model.npz"))


@lru_cache
def images(folder: Path) -> Any:
    """Calibration images, channels last: a NumPy array, which whatever takes JAX's takes too."""
    with np.load(folder / "data.npz") as file:
        return np.ascontiguousarray(file["calib_images"].transpose(0, 2, 3, 1))


def recipe_of(**fields: Any) -> Recipe:
    return resolve(RecipeConfig(**fields), sites_of(SMALL))
