"""The small trained ViT of the golden arrays, quantized, for tests of interpreters."""

from functools import lru_cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from golden_vit import recipe_of, small_model

from cptv_jax.methods.registry import METHODS
from cptv_jax.quantized.model import QuantizedModel
from cptv_jax.quantizers import Uniform

RNG = np.random.default_rng


def uniform(scale: Any, zero_point: float = 0.0, low: float = 0.0, high: float = 255.0) -> Uniform:
    return Uniform(*(jnp.asarray(a, jnp.float32) for a in (scale, zero_point, low, high)))


def normal(seed: int, *shape: int) -> np.ndarray:
    return RNG(seed).normal(size=shape).astype(np.float32)


@lru_cache
def small_images(folder: Path) -> tuple[Any, Any]:
    """Calibration and test images, channels last: NumPy arrays, which whatever takes JAX's takes too."""
    with np.load(folder / "data.npz") as file:
        return file["calib_images"].transpose(0, 2, 3, 1), file["test_images"].transpose(0, 2, 3, 1)


@lru_cache
def quantized(folder: Path, preset: str) -> QuantizedModel:
    model, recipe = small_model(folder), recipe_of(preset=preset, weight_bits=4)
    images = small_images(folder)[0]
    (method,) = [method for method in METHODS.values() if preset in method.presets]
    return method.quantize(model, [jnp.asarray(images[:8]), jnp.asarray(images[8:16])], recipe, jax.random.key(0))
