"""Writes a calibrated cptv_jax model's quantizer parameters, some images and our outputs to an npz for PyTorch.

    python -m benchmarks.export_parameters --weights W.safetensors --images CALIBRATION --eval LABELLED --out p.npz

The archive has `{site}/scale`, `zero_point`, `low`, `high` for every site of the recipe; `pixels` (uint8 NHWC, after
preprocessing) with `mean` and `std`; with --eval also `eval_pixels` and their `float_logits` and `quantized_logits`.
It prints a JSON object; with --eval it has the noise floor, how far our own logits move when the weights are
multiplied by 1 + 1e-7 N(0, 1): about one unit in the last place, which flips some codes.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cptv_jax import Images, Model, QuantizedModel, RecipeConfig, Stage, load_float_model, load_images, resolve
from cptv_jax.methods.registry import METHODS
from cptv_jax.models.architecture import sites_of
from cptv_jax.quantizers import BiasCorrected, Uniform
from cptv_jax.runtime.forward import compute_outputs


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


def logits(stages: Sequence[Stage], images: Images) -> np.ndarray:
    """Logits [N, classes]."""
    return np.asarray(compute_outputs(stages, images.normalize, len(images)).logits)


def perturbed(model: Model, seed: int = 0) -> Model:
    """The model with weights that differ by about one unit in the last place."""
    leaves, structure = jax.tree.flatten(model.weights)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    moved = [leaf * (1 + 1e-7 * jax.random.normal(key, leaf.shape)) for leaf, key in zip(leaves, keys, strict=True)]
    return replace(model, weights=jax.tree.unflatten(structure, moved))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", required=True)
    parser.add_argument("--images", required=True, help="unlabelled calibration images")
    parser.add_argument("--eval", help="evaluation images, for the comparison of logits only")
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--count", type=int, default=100, help="calibration images to export")
    parser.add_argument("--eval-count", type=int, default=50)
    parser.add_argument("--calibrate", type=int, default=50, help="calibrate on the first so many, in one batch")
    parser.add_argument("--weight-bits", type=int, default=4)
    options = parser.parse_args()

    teacher = load_float_model(options.weights)
    preprocessing = teacher.architecture.preprocessing
    images = load_images(options.images, preprocessing, labels=False, limit=options.count, progress=False)
    config = RecipeConfig(preset="evol-q", weight_bits=options.weight_bits, activation_bits=8)
    recipe = resolve(config, sites_of(teacher.architecture))
    batch = jnp.asarray(images.normalize(0, options.calibrate))
    model = METHODS["fq-vit"].quantize(teacher, [batch], recipe, jax.random.key(0))

    arrays: dict[str, Any] = {
        "pixels": images.pixels,
        "mean": np.asarray(preprocessing.mean, np.float32),
        "std": np.asarray(preprocessing.std, np.float32),
    }
    found: dict[str, Any] = {"sites": len(model.quantizers), "images": len(images)}
    if options.eval:
        shown = load_images(options.eval, preprocessing, labels=False, limit=options.eval_count, progress=False)
        quantized = logits(model.stages(), shown)
        moved = logits(replace(model, model=perturbed(teacher)).stages(), shown)
        found["floor_mean"] = float(abs(moved - quantized).mean())
        found["floor_predictions"] = int((moved.argmax(-1) != quantized.argmax(-1)).sum())
        arrays |= {"eval_pixels": shown.pixels, "quantized_logits": quantized}
        arrays["float_logits"] = logits(teacher.stages(), shown)
    np.savez(options.out, **{**parameters(model), **arrays})
    print(json.dumps(found))


if __name__ == "__main__":
    main()
