"""What holds for every base method: images decide, odd images do no harm, and a quantized model is refused."""

from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_vit import SMALL, images, recipe_of, small_model

from cptv_jax import (
    CalibrationConfig,
    InputError,
    QuantizeConfig,
    RecipeConfig,
    SearchConfig,
    images_from_arrays,
    load_model,
    quantize,
)
from cptv_jax.config.schema import SpaceConfig
from cptv_jax.methods.aiqvit import AiqvitOptions
from cptv_jax.methods.ptq4vit import Ptq4VitOptions
from cptv_jax.methods.registry import METHODS
from cptv_jax.methods.repq_vit import RepqVitOptions
from cptv_jax.pipeline.closed_form import steps_to_least_output_error
from cptv_jax.pipeline.plan import make_plan
from cptv_jax.quantized.candidate import Space
from cptv_jax.quantized.model import QuantizedModel
from cptv_jax.reconstruction.config import ReconstructionConfig
from cptv_jax.runtime.forward import forward
from cptv_jax.search import Guided
from cptv_jax.search.events import PassEnd
from cptv_jax.search.proposals.base import Scales

KEY = jax.random.key(0)
SHORT: dict[str, Any] = {  # of methods that search for long, ranks among the rest
    "ptq4vit": Ptq4VitOptions(candidates=12, alpha=0.5, rounds=1),
    "aiqvit": AiqvitOptions(search_steps=2),
}


def quantized(folder: Path, method: str, batches: list[np.ndarray]) -> QuantizedModel:
    recipe = recipe_of(preset=METHODS[method].presets[0], weight_bits=4, activation_bits=4)
    options = {"options": SHORT[method]} if method in SHORT else {}
    return METHODS[method].quantize(small_model(folder), [jnp.asarray(b) for b in batches], recipe, KEY, **options)


@lru_cache
def made(folder: Path, method: str, start: int = 0) -> QuantizedModel:
    """From two batches, the first image of which is this one."""
    return quantized(folder, method, [images(folder)[start : start + 8], images(folder)[start + 8 : start + 16]])


def leaves(model: QuantizedModel) -> list[np.ndarray]:
    return [np.asarray(leaf) for leaf in jax.tree.leaves((model.model.weights, dict(model.quantizers)))]


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_calibration_images_determine_the_model(golden: Path, method: str) -> None:
    first, again, other = made(golden, method), made.__wrapped__(golden, method), made(golden, method, start=40)
    assert all(np.array_equal(a, b) for a, b in zip(leaves(first), leaves(again), strict=True))
    same = {
        site
        for site, quantizer in first.quantizers.items()
        if np.array_equal(quantizer.scale, other.quantizers[site].scale)
    }
    # A range can be that of all images, as the input's of white and black is, or lie on the few values of a grid.
    activations = {site for site in first.quantizers if not site.endswith(".weight")}
    assert len(same & activations) < len(activations) / 4
    plain = small_model(golden)
    kept = jax.tree.map(np.array_equal, plain.weights, first.model.weights)
    assert all(jax.tree.leaves(kept)) != METHODS[method].rewrites_weights
    for layer in ("blocks.0.attn.qkv", "blocks.2.mlp.fc1") if METHODS[method].rewrites_weights else ():
        kernels = [np.asarray(model.layer(layer)["kernel"]) for model in (plain, first.model, other.model)]
        assert not any(np.array_equal(kernels[i], kernels[j]) for i, j in ((0, 1), (0, 2), (1, 2)))
    if method in ("repq-vit", "erq"):
        assert same & activations <= {"embed.input"}
    x = jnp.asarray(images(golden)[:8])
    logits = [np.asarray(forward(model.stages(), x).logits) for model in (plain, first, other)]
    assert not any(np.allclose(logits[i], logits[j], atol=1e-3) for i, j in ((0, 1), (0, 2), (1, 2)))


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("value", [0.0, 1.0, -1.0, None], ids=["zeros", "ones", "black", "one image repeated"])
def test_images_without_variation_give_a_finite_model(golden: Path, method: str, value: float | None) -> None:
    one = images(golden)[:1]
    batch = np.repeat(one, 8, 0) if value is None else np.full((8, *one.shape[1:]), value, np.float32)
    model = quantized(golden, method, [batch])
    assert all(np.isfinite(leaf).all() for leaf in leaves(model))
    assert all(np.all(np.asarray(quantizer.scale) > 0) for quantizer in model.quantizers.values())
    assert np.isfinite(forward(model.stages(), jnp.asarray(images(golden)[:4])).logits).all()
    assert all(np.isfinite(step).all() for step in jax.tree.leaves(rounding_steps(model, batch)[1]))


def rounding_steps(base: QuantizedModel, batch: np.ndarray) -> tuple[Scales, Scales]:
    """All candidates, and the steps to roundings in closed form from them."""
    stages = base.stages(space=Space(base.quantizers, offsets=True, rounding=True))
    scales = {stage.name: stage.candidate for stage in stages if stage.searchable}
    return scales, steps_to_least_output_error(base, scales, [jnp.asarray(batch)])


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_weights_that_are_not_on_their_grid_yet_are_rounded_in_closed_form(golden: Path, method: str) -> None:
    scales, steps = rounding_steps(made(golden, method), images(golden)[:16])
    assert jax.tree.map(jnp.shape, steps) == jax.tree.map(jnp.shape, scales)
    moved = {
        f"{stage}.{site}": {name for name in free.names if np.any(getattr(free, name))}
        for stage, parts in steps.items()
        for site, free in parts.items()
    }
    layers = {site for site, names in moved.items() if names}
    weights = {site for site in made(golden, method).quantizers if site.endswith(".weight")}
    # ERQ's weights lie on their grids, or have two, and AIQViT's have float terms that would have to change with them.
    assert layers == (set() if method in ("erq", "aiqvit") else weights)
    assert set().union(*moved.values()) <= {"rounding", "factor"}


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_a_run_is_searched_saved_continued_and_reported(golden: Path, method: str, tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (24, 32, 32, 3)).astype(np.uint8)
    given = images_from_arrays(pixels[:16], preprocessing=SMALL.preprocessing)
    test = images_from_arrays(pixels[16:], np.arange(8), preprocessing=SMALL.preprocessing)
    config = replace(
        QuantizeConfig(method=SHORT.get(method, method)),
        recipe=RecipeConfig(weight_bits=4, activation_bits=6),
        calibration=CalibrationConfig(16, 8),
        reconstruction=ReconstructionConfig(steps=2, batch=4),
        search=SearchConfig(strategy=Guided(steps=2, batch=4, children=2), space=SpaceConfig(sites=("*",))),
    )
    first = quantize(small_model(golden), given, config, out=tmp_path, evaluation=test)
    assert set(first.results) == {"float", "base", "final"} and isinstance(first.log[-1], PassEnd)
    assert min(event.loss for event in first.log) == first.log[-1].loss <= first.log[0].loss
    assert f"recipe {first.model.recipe.name}" in (tmp_path / "report.md").read_text()
    again = quantize(small_model(golden), given, config, out=tmp_path, evaluation=test)
    saved = load_model(str(tmp_path))
    assert isinstance(saved, QuantizedModel)
    for other in (again.model, saved):
        assert all(np.array_equal(a, b) for a, b in zip(leaves(first.model), leaves(other), strict=True))
    assert again.results == first.results


@pytest.mark.parametrize(
    ("method", "steps", "read"),
    [
        ("fq-vit", 0, 16),
        ("erq", 0, 16),
        ("ptq4vit", 0, 5),
        ("repq-vit", 0, 5),
        ("repq-vit", 2, 16),
        ("aiqvit", None, 16),
    ],
)
def test_the_plan_says_how_many_images_a_method_reads(golden: Path, method: str, steps: int | None, read: int) -> None:
    options = {"ptq4vit": Ptq4VitOptions(images=5), "repq-vit": RepqVitOptions(images=5)}.get(method, method)
    config = QuantizeConfig(method=options, calibration=CalibrationConfig(16, 8), search=SearchConfig(strategy="none"))
    config = replace(config, reconstruction=ReconstructionConfig(steps=steps))
    given = images_from_arrays(np.zeros((16, 32, 32, 3), np.uint8), preprocessing=SMALL.preprocessing)
    assert make_plan(small_model(golden), given, config).base_images == read


@pytest.mark.parametrize("method", METHODS)
def test_a_quantized_model_is_refused(golden: Path, method: str) -> None:
    model = made(golden, "fq-vit")
    with pytest.raises(InputError, match=r"quantized already \(recipe evol-q\); give the float model"):
        METHODS[method].quantize(model, [jnp.asarray(images(golden)[:4])], model.recipe, KEY)
    pixels = np.zeros((4, 32, 32, 3), np.uint8)
    with pytest.raises(InputError, match="quantized already"):
        quantize(model, images_from_arrays(pixels, preprocessing=SMALL.preprocessing), QuantizeConfig(method=method))  # type: ignore[arg-type]
