"""RepQ-ViT and ERQ as base methods: what they change, what they refuse, and what becomes of their models."""

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
from cptv_jax.calibration.first_pass import find_reparameterizable, initialize, reparameterize
from cptv_jax.calibration.moments import collect_moments, layers_of
from cptv_jax.calibration.percentile import fit_weight
from cptv_jax.methods.erq import WEIGHT_PERCENTILES, ErqOptions, penalties
from cptv_jax.methods.registry import METHODS
from cptv_jax.methods.repq_vit import RepqVitOptions
from cptv_jax.quantized.candidate import Space
from cptv_jax.quantized.model import QuantizedModel
from cptv_jax.quantizers import DualUniform
from cptv_jax.runtime.forward import forward
from cptv_jax.search import Evaluator, Objective
from cptv_jax.storage.models import save_model

BOTH = ("repq-vit", "erq")
KEY = jax.random.key(0)


@lru_cache
def made(
    golden: Path,
    method: str,
    bits: int = 4,
    parts: tuple[tuple[int, int], ...] = ((0, 8), (8, 16)),
    options: ErqOptions | RepqVitOptions | None = None,
) -> QuantizedModel:
    """A quantized model from these ranges of the calibration images, a batch each."""
    recipe = recipe_of(preset=method, weight_bits=bits, activation_bits=bits)
    batches = [jnp.asarray(images(golden)[start:stop]) for start, stop in parts]
    given = {} if options is None else {"options": options}
    return METHODS[method].quantize(small_model(golden), batches, recipe, KEY, **given)


def leaves(model: QuantizedModel) -> list[np.ndarray]:
    return [np.asarray(leaf) for leaf in jax.tree.leaves((model.model.weights, dict(model.quantizers)))]


@pytest.mark.parametrize("method", BOTH)
def test_eight_bits_stay_close_to_the_float_model(golden: Path, method: str) -> None:
    model, x = made(golden, method, bits=8, parts=((0, 32),)), jnp.asarray(images(golden))
    expected = np.asarray(forward(small_model(golden).stages(), x).logits)
    found = np.asarray(forward(model.stages(), x).logits)
    assert np.mean(found.argmax(1) == expected.argmax(1)) >= 0.97
    # Not closer: at any width a power of sqrt(2) is up to 19% off.
    assert np.abs(found - expected).mean() < 0.1 * np.abs(expected).mean()


@pytest.mark.parametrize("method", BOTH)
def test_a_saved_model_is_the_same_to_the_bit(golden: Path, method: str, tmp_path: Path) -> None:
    model = made(golden, method)
    save_model(tmp_path / "m", model)
    again = load_model(str(tmp_path / "m"))
    assert isinstance(again, QuantizedModel) and again.recipe == model.recipe
    for site, quantizer in model.quantizers.items():
        assert type(again.quantizers[site]) is type(quantizer)
    assert all(np.array_equal(a, b) and a.dtype == b.dtype for a, b in zip(leaves(model), leaves(again), strict=True))
    x = jnp.asarray(images(golden)[:4])
    np.testing.assert_array_equal(forward(model.stages(), x).logits, forward(again.stages(), x).logits)


@pytest.mark.parametrize(
    ("method", "fields", "expected"),
    [
        ("repq-vit", {"weight_observer": "minmax"}, "cannot use the observer minmax; set observer to method"),
        ("repq-vit", {"weight_signed": True}, "unsigned codes with a zero point"),
        ("erq", {"bias_correction": True}, "unsigned codes with a zero point"),
        ("repq-vit", {"overrides": {"*.fc1.weight": {"quantizer": "dual-uniform"}}}, "fits no dual-uniform"),
        ("erq", {"overrides": {"*.softmax": {"quantizer": "log2"}}}, "fits no log2 quantizer here"),
        ("fq-vit", {"overrides": {"*.softmax": {"quantizer": "log-sqrt2"}}}, "fits no log-sqrt2 quantizer here"),
        ("fq-vit", {"activation_observer": "method"}, "cannot use the observer method"),
        ("erq", {"preset": "evol-q"}, "cannot carry out the recipe preset 'evol-q'"),
    ],
)
def test_what_a_method_cannot_carry_out_is_refused_before_anything_is_written(
    golden: Path, tmp_path: Path, method: str, fields: dict[str, object], expected: str
) -> None:
    config = QuantizeConfig(method, recipe=RecipeConfig(**fields), search=SearchConfig("none"))  # type: ignore[arg-type]
    config = replace(config, calibration=CalibrationConfig(4, 4))
    some = images_from_arrays(np.zeros((4, 32, 32, 3), np.uint8), preprocessing=SMALL.preprocessing)
    with pytest.raises(InputError, match=expected):
        quantize(small_model(golden), some, config, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize("method", BOTH)
def test_the_search_moves_the_scales_of_weights(golden: Path, method: str) -> None:
    model = made(golden, method, bits=3)
    assert isinstance(model.quantizers["blocks.2.attn.qkv.weight"], DualUniform) == (method == "erq")
    x = jnp.asarray(images(golden)[:16])
    space = Space([s for s in model.quantizers if s.startswith("blocks.2.attn") and s.endswith(".weight")])
    stages = model.stages(space=space)
    teacher = forward(small_model(golden).stages(), x)
    evaluator = Evaluator(stages, [np.asarray(x)], [teacher], Objective("mse", "logits", 1.0), len(x), width=2)
    start = stages[3].candidate
    factors = np.asarray([1.0, 0.9, 0.5], np.float32)
    population = jax.tree.map(lambda scale: factors[:, None] * np.asarray(scale), start)
    losses = evaluator.losses(3, population)
    # A search compares with the model's own scales.
    np.testing.assert_allclose(losses[0], evaluator.loss_of(3, start), rtol=1e-6)
    assert np.isfinite(losses).all() and len(set(losses.tolist())) == 3
    second = jax.tree.map(lambda leaf: leaf[1], population)
    bound = forward(model.with_candidates({"blocks.2": second}).stages(), x)
    np.testing.assert_allclose(np.mean((bound.logits - teacher.logits) ** 2), losses[1], rtol=1e-4)


@pytest.mark.parametrize("method", BOTH)
def test_progress_ends_at_its_total(golden: Path, method: str) -> None:
    seen: list[tuple[int, int]] = []
    x, recipe = images(golden), recipe_of(preset=method)
    batches = [jnp.asarray(x[:4]), jnp.asarray(x[4:8])]
    METHODS[method].quantize(small_model(golden), batches, recipe, KEY, lambda *count: seen.append(count))
    total = 5 if method == "repq-vit" else 3 * 5 + 14
    assert seen == [(i + 1, total) for i in range(total)]


def test_erq_brings_every_layer_closer_to_its_float_output_than_rounding_does(golden: Path) -> None:
    final, recipe = made(golden, "erq"), recipe_of(preset="erq", weight_bits=4, activation_bits=4)
    batches = [jnp.asarray(images(golden)[:8]), jnp.asarray(images(golden)[8:16])]
    pairs = find_reparameterizable(small_model(golden), recipe)
    activations = initialize(small_model(golden), jnp.concatenate(batches), recipe, pairs, weights=False)
    start, changed = reparameterize(small_model(golden), activations, pairs)
    moments = collect_moments(start, batches, layers_of(start, recipe), {**activations, **changed})
    for name, found in moments.items():
        old, new = start.layer(name), final.model.layer(name)
        quantizer = fit_weight(recipe.sites[f"{name}.weight"], old["kernel"], WEIGHT_PERCENTILES)
        rounded = {**old, "kernel": quantizer.values(quantizer.codes(old["kernel"]))}

        def error(layer: dict[str, jax.Array], old: Any = old, found: Any = found) -> float:
            """Squared error of the layer's outputs, but for what the same layer without change has."""
            change = np.concatenate([layer["kernel"] - old["kernel"], (layer["bias"] - old["bias"])[None]])
            return float(np.sum(change * (found.gram @ change)) - 2 * np.sum(change * found.cross))

        assert error(new) < 0.9 * error(rounded), name


@pytest.mark.slow
@pytest.mark.parametrize("options", [RepqVitOptions, ErqOptions])
def test_shared_options_act(golden: Path, options: type[RepqVitOptions] | type[ErqOptions]) -> None:
    method = "repq-vit" if options is RepqVitOptions else "erq"
    plain, changed = made(golden, method), made(golden, method, options=options(images=4, round_zero_point=True))
    points = [[float(model.quantizers[f"blocks.{i}.norm1"].zero_point) for i in range(3)] for model in (plain, changed)]  # type: ignore[attr-defined]
    assert [all(point.is_integer() for point in some) for some in points] == [False, True]
    assert plain.quantizers["blocks.0.attn.query"].scale != changed.quantizers["blocks.0.attn.query"].scale


@pytest.mark.slow
@pytest.mark.parametrize("options", [ErqOptions(coe=2e4), ErqOptions(flips=0)], ids=["coe", "flips"])
def test_options_of_erq_act(golden: Path, options: ErqOptions) -> None:
    plain, changed = (
        made(golden, "erq", options=given).model.layer("blocks.0.mlp.fc1")["kernel"] for given in (None, options)
    )
    assert not np.array_equal(plain, changed)


def test_erq_weights_lie_on_their_grids(golden: Path) -> None:
    model = made(golden, "erq")
    for site, quantizer in model.quantizers.items():
        if site.endswith(".weight"):
            kernel = model.model.layer(site.removesuffix(".weight"))["kernel"]
            np.testing.assert_allclose(quantizer.values(quantizer.codes(kernel)), kernel, atol=2e-6, err_msg=site)


@pytest.mark.slow
def test_moments_are_sums_over_all_images_however_they_are_batched(golden: Path) -> None:
    model, x, recipe = small_model(golden), images(golden)[:12], recipe_of(preset="erq", activation_bits=4)
    layers = layers_of(model, recipe)
    assert [layer.name for layer in layers if layer.convolution] == ["embed.proj"]
    assert [layer.name for layer in layers if layer.per_image] == ["head.fc"]
    quantizers = initialize(model, jnp.asarray(x), recipe, {}, weights=False)
    whole = collect_moments(model, [jnp.asarray(x)], layers, quantizers)
    parts = collect_moments(model, [jnp.asarray(x[:5]), jnp.asarray(x[5:])], layers, quantizers)
    for name, moments in whole.items():
        scale = np.abs(moments.gram).max()
        np.testing.assert_allclose(moments.gram, parts[name].gram, atol=1e-5 * scale, err_msg=name)
    assert float(whole["head.fc"].gram[-1, -1]) == 12 and float(whole["blocks.0.attn.qkv"].gram[-1, -1]) == 12 * 17
    # The first layer's by hand: its input is not quantized, so nothing is lacking.
    patches = x.reshape(12, 4, 8, 4, 8, 3).transpose(0, 1, 3, 2, 4, 5).reshape(-1, 192)
    rows = np.concatenate([patches, np.ones((len(patches), 1))], 1)
    np.testing.assert_allclose(whole["embed.proj"].gram, rows.T @ rows, rtol=1e-4, atol=1e-2)
    assert np.abs(whole["embed.proj"].cross).max() < 1e-2
    assert np.abs(whole["blocks.0.attn.qkv"].cross).max() > 1


def test_ridge_terms_are_the_published_ones_at_the_published_number_of_images(golden: Path) -> None:
    layers = {layer.name: layer for layer in layers_of(small_model(golden), recipe_of(preset="erq"))}
    token, head, patches = layers["blocks.0.attn.qkv"], layers["head.fc"], layers["embed.proj"]
    rows_of_1024 = {token: 1024 * 197, head: 1024, patches: 1024 * 197}
    for layer, expected in {token: (2e3, 2e3), head: (0.1, 2e3), patches: (2e3, 2e4)}.items():
        rows = rows_of_1024[layer]
        assert penalties(layer, rows, None) == pytest.approx(expected)
        assert penalties(layer, rows / 32, None) == pytest.approx([value / 32 for value in expected])
        assert penalties(layer, rows / 32, 2e4) == pytest.approx(expected)  # given, it is not scaled
