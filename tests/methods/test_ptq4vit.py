"""PTQ4ViT's method: intervals, search and model, on the small digits ViT."""

from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_vit import SMALL, images, small_model

from cptv_jax.errors import InputError
from cptv_jax.methods.ptq4vit import Ptq4VitOptions, _sample_gradients, quantize
from cptv_jax.methods.registry import METHODS
from cptv_jax.models.architecture import sites_of
from cptv_jax.quantized.candidate import Space
from cptv_jax.quantized.model import Model, QuantizedModel
from cptv_jax.quantizers import TwinGelu, TwinSoftmax, Uniform
from cptv_jax.recipe.resolve import RecipeConfig, resolve
from cptv_jax.recipe.spec import Recipe
from cptv_jax.runtime.forward import forward
from cptv_jax.runtime.stages import Output
from cptv_jax.search import Evaluator, Objective
from cptv_jax.storage.models import load_model, save_model

FAST = Ptq4VitOptions(candidates=12, alpha=0.5, rounds=1)
KEY = jax.random.key(0)


def recipe_of(preset: str = "ptq4vit", bits: int = 6, **fields: Any) -> Recipe:
    return resolve(RecipeConfig(preset=preset, weight_bits=bits, activation_bits=bits, **fields), sites_of(SMALL))


def run(model: Model, some: np.ndarray, recipe: Recipe, options: Ptq4VitOptions = FAST, **given: Any) -> QuantizedModel:
    return quantize(model, [jnp.asarray(some)], recipe, given.pop("key", KEY), options=options, **given)


@lru_cache
def fast_result(folder: Path) -> QuantizedModel:
    return run(small_model(folder), images(folder)[:8], recipe_of())


def scales(model: QuantizedModel) -> dict[str, np.ndarray]:
    return {site: np.asarray(quantizer.scale) for site, quantizer in model.quantizers.items()}


def test_every_site_gets_the_kind_and_granularity_of_quantizer_that_the_recipe_says(golden: Path) -> None:
    result = fast_result(golden)
    assert list(result.quantizers) == list(result.recipe.sites)
    assert "embed.input" not in result.quantizers
    expected = {
        "embed.proj.weight": (Uniform, (64,)),
        "blocks.1.attn.qkv.weight": (Uniform, (3,)),
        "blocks.1.attn.proj.weight": (Uniform, ()),
        "blocks.1.norm1": (Uniform, ()),
        "blocks.1.attn.query": (Uniform, (4, 1, 1)),
        "blocks.1.attn.value": (Uniform, (4, 1, 1)),
        "blocks.1.attn.softmax": (TwinSoftmax, ()),
        "blocks.1.mlp.gelu": (TwinGelu, ()),
        "head.norm": (Uniform, ()),
    }
    for site, (kind, shape) in expected.items():
        assert type(result.quantizers[site]) is kind and result.quantizers[site].scale.shape == shape, site
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(result.quantizers))
    assert all((scale > 0).all() for scale in scales(result).values())


@pytest.mark.slow
def test_the_baseline_is_uniform_everywhere(golden: Path) -> None:
    recipe = recipe_of("base-ptq", overrides={"blocks.[02].*": None, "blocks.*.mlp.fc1.weight": None, "head.*": None})
    result = run(small_model(golden), images(golden)[:8], recipe)
    assert {type(quantizer) for quantizer in result.quantizers.values()} == {Uniform}
    shapes = {site.removeprefix("blocks.1."): scale.shape for site, scale in scales(result).items()}
    assert shapes["embed.proj.weight"] == shapes["mlp.gelu"] == ()
    assert shapes["attn.softmax"] == (4, 1, 1) and shapes["attn.qkv.weight"] == (3,)


def test_intervals_are_factors_of_the_largest_absolute_value(golden: Path) -> None:
    result = fast_result(golden)
    factors = np.asarray([0.5 + i * 0.7 / 12 for i in range(12)])
    kernel = np.asarray(small_model(golden).layer("blocks.1.attn.qkv")["kernel"])
    initial = np.abs(kernel.reshape(64, 3, 64)).max((0, 2)) / 31.5
    ratios = np.asarray(result.quantizers["blocks.1.attn.qkv.weight"].scale) / initial
    assert np.abs(ratios[:, None] - factors).min(1).max() < 1e-6
    gelu = result.quantizers["blocks.1.mlp.gelu"]
    assert isinstance(gelu, TwinGelu)
    np.testing.assert_allclose(gelu.negative_scale, 0.16997124254703522 / 32, rtol=1e-6)
    softmax = result.quantizers["blocks.1.attn.softmax"]
    assert isinstance(softmax, TwinSoftmax)
    np.testing.assert_allclose(softmax.scale * softmax.ratio * softmax.levels, 1, rtol=1e-6)
    # The true piecewise form has use for its fine range: the split is not driven to where it vanishes.
    assert 2**-6 <= float(softmax.scale * softmax.levels) <= 2**-1


@pytest.mark.slow
def test_the_published_form_and_metric_give_the_recorded_intervals(golden: Path) -> None:
    """The whole search, on its own path. The noise floor of this recording is zero, so every interval must agree."""
    options = Ptq4VitOptions(images=96, metric="l2", softmax_form="published")
    result = run(small_model(golden), images(golden)[:96], recipe_of(), options)
    with np.load(golden / "ptq4vit_l2_w6a6.npz") as file:
        for block in range(3):
            for site, key in {
                "attn.qkv.weight": "attn.qkv/w_interval",
                "norm1": "attn.qkv/a_interval",
                "attn.key": "attn.matmul1/B_interval",
                "attn.softmax": "attn.matmul2/A_interval",
                "mlp.gelu": "mlp.fc2/a_interval",
            }.items():
                found = np.ravel(result.quantizers[f"blocks.{block}.{site}"].scale)
                np.testing.assert_allclose(found, file[f"param/blocks.{block}.{key}"].ravel(), rtol=1e-6)
        step = result.quantizers["embed.proj.weight"].scale
        np.testing.assert_allclose(step, file["param/patch_embed.proj/w_interval"].ravel(), rtol=1e-6)


@pytest.mark.slow
def test_calibration_images_matter_and_the_model_is_still_close_to_the_float_one(golden: Path) -> None:
    model, some = small_model(golden), images(golden)
    result, other = fast_result(golden), run(small_model(golden), some[8:16] * 0.5, recipe_of())
    first, second = scales(result), scales(other)
    assert sum(not np.array_equal(first[site], second[site]) for site in first) > len(first) / 2
    teacher, student = (np.asarray(forward(m.stages(), some[:32]).logits) for m in (model, result))
    assert not np.array_equal(teacher, student)
    assert np.mean(np.argmax(teacher, -1) == np.argmax(student, -1)) > 0.9


def test_a_gradient_of_zero_keeps_the_initial_intervals(golden: Path) -> None:
    """A float model that is certain of every sampled label says nothing about what matters."""
    result = run(small_model(golden), images(golden)[:4], recipe_of(), logit_gradient=jnp.zeros((4, 10)))
    kernel = np.asarray(small_model(golden).layer("blocks.1.mlp.fc1")["kernel"])
    ratio = float(result.quantizers["blocks.1.mlp.fc1.weight"].scale) / (np.abs(kernel).max() / 31.5)
    assert abs(ratio - 1) < 0.7 / 12


@pytest.mark.slow
def test_it_searches_on_the_first_images(golden: Path) -> None:
    sites = recipe_of(overrides={"blocks.[02].*": None, "*.mlp.*": None, "head.*": None, "embed.*": None})
    options = replace(FAST, images=4, images_at_once=2)
    few, more = (scales(run(small_model(golden), images(golden)[:n], sites, options)) for n in (4, 8))
    assert all(np.array_equal(few[site], more[site]) for site in few)


@pytest.mark.slow
def test_chunks_do_not_change_the_search_and_equal_keys_give_equal_results(golden: Path) -> None:
    model, some = small_model(golden), images(golden)[:8]
    recipe = recipe_of(overrides={"blocks.[02].*": None, "*.mlp.*": None, "head.*": None, "embed.*": None})
    whole = scales(run(model, some, recipe, Ptq4VitOptions(candidates=12, alpha=0.5, rounds=1, images_at_once=8)))
    parts = Ptq4VitOptions(candidates=12, alpha=0.5, rounds=1, images_at_once=2, candidates_at_once=5)
    split = quantize(model, [jnp.asarray(some[:4]), jnp.asarray(some[4:])], recipe, KEY, options=parts)
    for site, scale in scales(split).items():
        np.testing.assert_allclose(scale, whole[site], rtol=1e-6, err_msg=site)
    again = scales(run(model, some, recipe, Ptq4VitOptions(candidates=12, alpha=0.5, rounds=1, images_at_once=8)))
    assert all(np.array_equal(again[site], whole[site]) for site in whole)


def test_hessian_weights_are_gradients_of_labels_drawn_from_the_output_by_the_key() -> None:
    """softmax less one label: of a model that is in doubt, other keys draw others. Chunks keep their images."""
    logits = jnp.zeros((8, 10))
    outputs = [Output(jnp.zeros((4, 3)), logits[:4]), Output(jnp.zeros((4, 3)), logits[4:])]
    drawn = [
        np.concatenate([part.logits for part in _sample_gradients(outputs, jax.random.key(seed))]) for seed in (0, 0, 1)
    ]
    np.testing.assert_array_equal(drawn[0], drawn[1])
    assert not np.array_equal(drawn[0], drawn[2])
    labels = np.argmin(drawn[0], 1)
    np.testing.assert_allclose(drawn[0], 0.1 - np.eye(10)[labels], rtol=0, atol=1e-7)


def test_the_result_is_saved_and_loaded_bit_for_bit(golden: Path, tmp_path: Path) -> None:
    result = fast_result(golden)
    save_model(tmp_path / "model", result)
    loaded = load_model(str(tmp_path / "model"))
    assert isinstance(loaded, QuantizedModel) and loaded.recipe == result.recipe
    assert jax.tree.structure(dict(loaded.quantizers)) == jax.tree.structure(dict(result.quantizers))  # type: ignore[operator]
    for a, b in zip(jax.tree.leaves(dict(loaded.quantizers)), jax.tree.leaves(dict(result.quantizers)), strict=True):
        np.testing.assert_array_equal(a, b)
    some = images(golden)[:4]
    np.testing.assert_array_equal(forward(loaded.stages(), some).logits, forward(result.stages(), some).logits)


@pytest.mark.slow
def test_the_search_can_change_its_scales(golden: Path) -> None:
    result, some = fast_result(golden), images(golden)[:8]
    searched = ("attn.qkv.weight", "attn.query", "attn.softmax", "mlp.gelu")
    stages = result.stages(space=Space([site for site in result.quantizers if site.endswith(searched)]))
    teacher = forward(small_model(golden).stages(), some)
    evaluator = Evaluator(stages, [some], [teacher], Objective("mse", "logits", 1.0))
    start = stages[2].candidate
    assert {site: free.scale.shape for site, free in start.items()} == {
        "attn.qkv.weight": (3,), "attn.query": (4, 1, 1), "attn.softmax": (), "mlp.gelu": ()
    }  # fmt: skip
    worse = jax.tree.map(lambda scale: scale * 3, start)
    assert evaluator.loss_of(2, start) < evaluator.loss_of(2, worse)
    stage = stages[2].with_candidate(worse)
    np.testing.assert_array_equal(stage.state["quantizers"]["attn.query"].scale, start["attn.query"].scale * 3)


def test_progress_counts_layers(golden: Path) -> None:
    seen: list[tuple[int, int]] = []
    recipe = recipe_of(overrides={"blocks.*": None})
    quantize(
        small_model(golden), [jnp.asarray(images(golden)[:2])], recipe, KEY, lambda *at: seen.append(at), options=FAST
    )
    assert seen == [(0, 2), (1, 2), (2, 2)]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"blocks.0.residual1": {"bits": 8}}, "no linear layer or matmul reads it"),
        ({"head.fc.weight": {"observer": "minmax"}}, "set observer to method"),
        ({"head.fc.weight": {"signed": False}}, "signed and symmetric"),
        ({"head.fc.weight": {"quantizer": "twin-gelu"}}, "fits no twin-gelu quantizer here"),
        ({"blocks.0.norm1": {"per_channel": True}}, "one interval for an activation"),
        ({"blocks.0.attn.softmax": {"per_head": True}}, "one a head for a matmul's uniform operand"),
    ],
)
def test_recipes_that_it_cannot_carry_out_are_refused(golden: Path, overrides: dict[str, Any], message: str) -> None:
    method = METHODS["ptq4vit"]
    with pytest.raises(InputError, match=message):
        assert method.abilities is not None
        recipe = recipe_of(overrides=overrides)
        method.abilities.check("ptq4vit", recipe)
        run(small_model(golden), images(golden)[:2], recipe)


def test_a_search_without_room_is_refused(golden: Path) -> None:
    with pytest.raises(InputError, match="0 < alpha < beta"):
        run(small_model(golden), images(golden)[:2], recipe_of(), Ptq4VitOptions(alpha=1.5))
