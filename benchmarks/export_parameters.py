"""Writes a calibrated cptv_jax model's quantizer parameters, some images and our outputs to an npz for PyTorch.

    python -m benchmarks.export_parameters --weights W.safetensors --images CALIBRATION --eval LABELLED --out p.npz

The archive has `{site}/scale`, `zero_point`, `low`, `high` for every site of the recipe; `pixels` (uint8 NHWC, after
preprocessing) with `mean` and `std`; `eval_pixels`; and `float_logits`, `quantized_logits` of the latter.
"""

import argparse
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cptv_jax import Images, QuantizedModel, RecipeConfig, Stage, forward, load_float_model, load_images, resolve
from cptv_jax.methods import METHODS
from cptv_jax.models.architecture import sites_of
from cptv_jax.quantizers import BiasCorrected, Uniform


def parameters(model: QuantizedModel) -> dict[str, np.ndarray]:
    """The quantizers' arrays by `{site}/{field}`."""
    arrays: dict[str, np.ndarray] = {}
    for site, quantizer in model.quantizers.items():
        base = quantizer.base if isinstance(quantizer, BiasCorrected) else quantizer
        if not isinstance(base, Uniform):
            raise TypeError(f"{site} has a {type(base).__name__} quantizer; only uniform ones are exported")
        for name in ("scale", "zero_point", "low", "high"):
            arrays[f"{site}/{name}"] = np.asarray(getattr(base, name), np.float32)
    return arrays


def logits(stages: tuple[Stage, ...], images: Images, chunk: int = 10) -> np.ndarray:
    """Logits [N, classes], a chunk at a time."""
    parts = [
        forward(stages, jnp.asarray(images.normalized(i, min(i + chunk, len(images)))))
        for i in range(0, len(images), chunk)
    ]
    return np.concatenate([np.asarray(part.logits) for part in parts])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", required=True)
    parser.add_argument("--images", required=True, help="unlabelled calibration images")
    parser.add_argument("--eval", required=True, help="evaluation images, for the comparison of logits only")
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--count", type=int, default=100, help="calibration images to export")
    parser.add_argument("--eval-count", type=int, default=50)
    parser.add_argument("--calibrate", type=int, default=50, help="calibrate on the first so many, in one batch")
    parser.add_argument("--weight-bits", type=int, default=4)
    options = parser.parse_args()

    teacher = load_float_model(options.weights)
    preprocessing = teacher.architecture.preprocessing
    images = load_images(options.images, preprocessing, labels=False, limit=options.count, progress=False)
    held_out = load_images(options.eval, preprocessing, labels=False, limit=options.eval_count, progress=False)
    config = RecipeConfig(preset="evol-q", weight_bits=options.weight_bits, activation_bits=8)
    recipe = resolve(config, sites_of(teacher.architecture))
    batch = jnp.asarray(images.normalized(0, options.calibrate))
    model = METHODS["fq-vit"].quantize(teacher, [batch], recipe, jax.random.key(0))

    arrays: dict[str, Any] = {
        "pixels": images.pixels,
        "eval_pixels": held_out.pixels,
        "mean": np.asarray(preprocessing.mean, np.float32),
        "std": np.asarray(preprocessing.std, np.float32),
        "float_logits": logits(teacher.stages(), held_out),
        "quantized_logits": logits(model.stages(), held_out),
    }
    np.savez(options.out, **parameters(model), **arrays)
    print(f"{options.out}: {len(model.quantizers)} sites, {len(images)} and {len(held_out)} images")


if __name__ == "__main__":
    main()
