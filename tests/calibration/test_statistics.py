"""Calibration: every site of the recipe gets its quantizer, from float statistics of all batches."""

from pathlib import Path

import jax
import numpy as np
import pytest
from golden_vit import SMALL, images, recipe_of, small_model

from cptv_jax.calibration import observers
from cptv_jax.calibration.statistics import calibrate
from cptv_jax.errors import InputError
from cptv_jax.models.architecture import sites_of
from cptv_jax.models.walk import _compiled_visit
from cptv_jax.quantized.execution import FullPrecision
from cptv_jax.quantized.model import QuantizedModel
from cptv_jax.quantizers import BiasCorrected, Log2, Quantizer, Uniform
from cptv_jax.recipe.presets import PRESETS
from cptv_jax.runtime.forward import forward, stage_inputs

PLAIN = {"weight_observer": "minmax", "activation_observer": "minmax", "power_of_two_factor": False}

BY_STATISTICS = ("evol-q", "evol-q-omse", "fq-vit", "omse", "omse-log2")


def scales(quantizers: dict[str, Quantizer]) -> dict[str, np.ndarray]:
    return {site: np.asarray(quantizer.scale) for site, quantizer in quantizers.items()}


@pytest.mark.parametrize("preset", BY_STATISTICS)
def test_every_site_of_the_recipe_and_no_other_gets_its_kind_of_quantizer(golden: Path, preset: str) -> None:
    recipe = recipe_of(preset=preset, weight_bits=4)
    quantizers = calibrate(small_model(golden), [images(golden)[:8], images(golden)[8:16]], recipe)
    assert list(quantizers) == list(recipe.sites)
    for site, quantizer in quantizers.items():
        spec = recipe.sites[site]
        kind = Log2 if spec.quantizer == "log2" else BiasCorrected if spec.bias_correction else Uniform
        assert type(quantizer) is kind, site
        shape = next(s.shape for s in sites_of(SMALL) if s.name == site)
        assert quantizer.scale.shape == (shape[-1:] if spec.per_channel else ()), site
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(quantizer)), site
    model = QuantizedModel(small_model(golden), recipe, quantizers)
    used = {f"{stage.name}.{site}" for stage in model.stages() for site in stage.state["quantizers"]}
    assert used == set(recipe.sites)
    assert np.isfinite(forward(model.stages(), images(golden)[:2]).logits).all()


@pytest.mark.parametrize("preset", sorted(set(PRESETS) - set(BY_STATISTICS)))
def test_what_only_a_method_s_own_search_sets_is_refused(golden: Path, preset: str) -> None:
    with pytest.raises(InputError, match=r"the observer method cannot set .* set observer to minmax or"):
        calibrate(small_model(golden), [images(golden)[:8]], recipe_of(preset=preset))


def test_sites_that_overrides_add_or_remove_are_fitted_or_left_out(golden: Path) -> None:
    overrides = {"blocks.1.mlp.*": None, "blocks.1.attn.query": {"bits": 6}}
    recipe = recipe_of(**PLAIN, overrides=overrides)
    quantizers = calibrate(small_model(golden), [images(golden)[:8]], recipe)
    assert list(quantizers) == list(recipe.sites)
    assert "blocks.1.mlp.gelu" not in quantizers and "blocks.0.mlp.gelu" in quantizers
    query = quantizers["blocks.1.attn.query"]
    assert isinstance(query, Uniform) and query.high == 63


def test_ranges_are_those_of_the_float_forward_pass_stage_after_stage(golden: Path) -> None:
    model, recipe = small_model(golden), recipe_of(**PLAIN)
    batches = [images(golden)[:8], images(golden)[8:16]]
    quantizers = calibrate(model, batches, recipe)
    outputs = [stage_inputs(model.stages(FullPrecision(all_tokens=True)), batch) for batch in batches]
    # Each stage's last site is its output, so a stage fed with anything else would show. XLA compiles the observed
    # forward anew, hence a few roundings.
    last_sites = ["embed.sum", *(f"blocks.{i}.residual2" for i in range(3))]
    for index, site in enumerate(last_sites, 1):
        tensor = np.concatenate([output[index].values for output in outputs])
        np.testing.assert_allclose(quantizers[site].scale, np.ptp(tensor) / 255, rtol=5e-6, err_msg=site)
    logits = np.concatenate([output[-1].logits for output in outputs])
    np.testing.assert_allclose(quantizers["head.fc"].scale, np.ptp(logits) / 255, rtol=5e-6)
    kernel = np.asarray(model.weights["blocks.1"]["mlp"]["fc1"]["kernel"])
    np.testing.assert_array_equal(quantizers["blocks.1.mlp.fc1.weight"].scale, np.ptp(kernel, axis=0) / np.float32(255))


@pytest.mark.slow
def test_how_images_are_batched_does_not_change_a_range(golden: Path) -> None:
    model, recipe, some = small_model(golden), recipe_of(**PLAIN), images(golden)[:16]
    single = scales(calibrate(model, [some], recipe))
    for batches in ([some[:8], some[8:]], [some[:8], some[8:13], some[13:]]):  # the last one is ragged
        found = scales(calibrate(model, batches, recipe))
        for site, scale in single.items():
            # Float sums may round differently in batches of another size.
            np.testing.assert_allclose(found[site], scale, rtol=5e-6, err_msg=site)


def test_scores_come_from_the_last_batch_and_ranges_from_all(golden: Path) -> None:
    model, some = small_model(golden), images(golden)
    recipe = recipe_of(preset="evol-q", weight_bits=4)
    batches = [some[:8], some[8:16] / 4]  # faint images last: their logits fill a part of the range
    quantizers = calibrate(model, batches, recipe)
    first, last = (forward(model.stages(), batch).logits for batch in batches)
    spec = recipe.sites["head.fc"]
    both = observers.update(spec, observers.update(spec, None, first), last)
    expected = observers.fit(spec, both, last)
    np.testing.assert_allclose(quantizers["head.fc"].scale, expected.scale, rtol=5e-6)
    from_last_alone = observers.fit(spec, observers.update(spec, None, last), last)
    scored_on_first = observers.fit(spec, both, first)
    for other in (from_last_alone, scored_on_first):  # neighbouring factors differ by 1%
        assert abs(float(other.scale / expected.scale) - 1) > 5e-3


def test_all_widths_share_compiled_programs(golden: Path) -> None:
    model, some = small_model(golden), images(golden)[:16]
    calibrate(model, [some[:8], some[8:]], recipe_of(preset="fq-vit"))  # its softmax has four bits
    compiled = _compiled_visit._cache_size()  # type: ignore[attr-defined]
    for bits in range(2, 9):
        fields = {"weight_bits": bits, "activation_bits": 10 - bits, "softmax_bits": bits}
        recipe = recipe_of(preset="fq-vit", **fields, overrides={"blocks.1.mlp.gelu": {"bits": 3}})
        quantizers = calibrate(model, [some[:8], some[8:]], recipe)
        for site, quantizer in quantizers.items():
            width = recipe.sites[site].bits
            low = -(2 ** (width - 1)) if site.endswith(".weight") else 0
            assert isinstance(quantizer, Uniform | Log2)
            assert float(quantizer.high) == low + 2**width - 1
            assert isinstance(quantizer, Log2) or float(quantizer.low) == low
    assert _compiled_visit._cache_size() == compiled  # type: ignore[attr-defined]


def test_progress_counts_every_stage_of_every_batch(golden: Path) -> None:
    seen: list[tuple[int, int]] = []
    some = images(golden)[:16]
    calibrate(
        small_model(golden), [some[:8], some[8:]], recipe_of(**PLAIN), lambda done, total: seen.append((done, total))
    )
    assert seen == [(i, 10) for i in range(1, 11)]


def test_log_int_softmax_acts_on_the_last_batch_alone(golden: Path) -> None:
    # Golden README, fact 1: sites behind the softmax see float attention in the first batches, 4-bit in the last.
    model, some = small_model(golden), images(golden)
    wide, narrow = some[:8], some[8:16]  # the range of block 0's context is that of the first eight images
    fields = {**PLAIN, "preset": "fq-vit"}
    logarithmic, plain = recipe_of(**fields), recipe_of(**fields, log_int_softmax=False)

    def difference(batches: list[jax.Array], site: str) -> float:
        found, reference = (calibrate(model, batches, recipe)[site].scale for recipe in (logarithmic, plain))
        return abs(float(found / reference) - 1)

    assert difference([wide, narrow], "blocks.0.attn.context") < 5e-6
    assert difference([narrow, wide], "blocks.0.attn.context") > 0.05
    assert difference([narrow, wide], "blocks.0.attn.scores") < 5e-6  # before the first softmax
