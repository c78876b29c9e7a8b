"""What a guided search tries before gradients: grids and roundings in closed form."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cptv_jax import Model, RecipeConfig, resolve
from cptv_jax.calibration.moments import Moments, layers_of, moments_by_stage
from cptv_jax.demo import DIGITS_VIT
from cptv_jax.interpreters import effective_weight, quantize_weight
from cptv_jax.methods.registry import METHODS
from cptv_jax.models.architecture import sites_of
from cptv_jax.pipeline.closed_form import steps_to_least_error, steps_to_least_output_error
from cptv_jax.quantized.candidate import Space
from cptv_jax.quantized.model import QuantizedModel
from cptv_jax.quantizers import Free, move_candidate
from cptv_jax.search.proposals.base import Scales

LAYERS = ("attn.qkv", "mlp.fc2")


def base_of(method: str, **recipe: Any) -> tuple[QuantizedModel, Scales, jax.Array]:
    """A 3-bit model, the candidates of its first block, and images, of which it has seen the first eight."""
    model = Model(DIGITS_VIT, DIGITS_VIT.initialize(0))
    images = jnp.asarray(np.random.default_rng(0).normal(size=(60, 32, 32, 3)).astype(np.float32))
    resolved = resolve(RecipeConfig(weight_observer="minmax", weight_bits=3, **recipe), sites_of(DIGITS_VIT))
    base = METHODS[method].quantize(model, [images[:8]], resolved, jax.random.key(0))
    stages = base.stages(space=block(base, rounding=True))
    return base, {stage.name: stage.candidate for stage in stages if stage.searchable}, images


def block(base: QuantizedModel, rounding: bool = False) -> Space:
    """All sites of the first block, with their offsets."""
    return Space([s for s in base.quantizers if s.startswith("blocks.0.")], offsets=True, rounding=rounding)


def changed(free: Free) -> set[str]:
    """The fields of steps that are not all zero."""
    return {name for name in free.names if np.any(getattr(free, name))}


def moved_by(base: QuantizedModel, scales: Scales, steps: Scales) -> QuantizedModel:
    assert set(steps) == set(scales) and set(steps["blocks.0"]) == set(scales["blocks.0"])
    return base.with_candidates({"blocks.0": move_candidate(scales["blocks.0"], steps["blocks.0"])})


def moments_of(base: QuantizedModel, name: str, images: jax.Array) -> Moments:
    layers = [layer for layer in layers_of(base.model, base.recipe) if layer.name == name]
    (found,) = [moments[name] for moments in moments_by_stage(base.model, [images], layers, base.quantizers) if moments]
    return jax.tree.map(lambda sums: np.asarray(sums, np.float64), found)


def change(model: QuantizedModel, base: QuantizedModel, name: str) -> np.ndarray:
    """What a layer's weights have become less the float ones."""
    kernel = base.model.layer(name)["kernel"]
    weight = effective_weight(quantize_weight(model.quantizers[f"{name}.weight"], kernel))
    return np.asarray(weight - kernel, np.float64)


@pytest.mark.slow
def test_steps_to_least_error_lead_to_weights_nearer_to_the_float_ones() -> None:
    base, scales, _ = base_of("omse", preset="omse")
    steps = steps_to_least_error(base, scales)
    for site, step in steps["blocks.0"].items():
        assert site.endswith(".weight") or not changed(step)  # activations stay
    moved = moved_by(base, scales, steps)
    for layer in LAYERS:
        kernel = base.model.layer(f"blocks.0.{layer}")["kernel"]

        def error(quantized: QuantizedModel, kernel: jax.Array = kernel, layer: str = layer) -> np.ndarray:
            quantizer = quantized.quantizers[f"blocks.0.{layer}.weight"]
            return np.mean((quantizer.values(quantizer.codes(kernel)) - kernel) ** 2, 0)

        assert np.all(error(moved) <= error(base) * (1 + 1e-5))  # of every channel; ties differ in the last place
        assert error(moved).mean() < 0.95 * error(base).mean()


WHOLE_TENSORS = {"*.weight": {"per_channel": False}}


@pytest.mark.parametrize(
    ("method", "recipe"),
    [
        ("omse", {"preset": "omse"}),
        ("omse", {"preset": "omse", "weight_signed": True}),
        pytest.param("fq-vit", {"preset": "evol-q"}, marks=pytest.mark.slow),
        pytest.param("fq-vit", {"preset": "evol-q", "overrides": WHOLE_TENSORS}, marks=pytest.mark.slow),
    ],
)
def test_steps_to_least_output_error_keep_more_of_what_layers_give(method: str, recipe: dict[str, Any]) -> None:
    base, scales, images = base_of(method, **recipe)
    steps = steps_to_least_output_error(base, scales, [images[:20], images[20:40]])
    assert jax.tree.map(jnp.shape, steps) == jax.tree.map(jnp.shape, scales)
    for site, step in steps["blocks.0"].items():
        assert changed(step) == {"rounding", "factor"}.intersection(step.names), site
    moved = moved_by(base, scales, steps)
    # What qkv reads is all but independent in a model of random weights; what fc2 reads is not.
    for layer, limit in (("attn.qkv", 0.9), ("mlp.fc2", 0.25)):
        name = f"blocks.0.{layer}"
        before, after = change(base, base, name), change(moved, base, name)
        seen, unseen = moments_of(base, name, images[:40]), moments_of(base, name, images[40:]).gram[:-1, :-1]
        error = {"before": np.sum(before * (unseen @ before)), "after": np.sum(after * (unseen @ after))}
        assert error["after"] < limit * error["before"], layer
        if method == "fq-vit":  # on the images that it was fitted on no channel would be better longer or shorter
            rounded = after + base.model.layer(name)["kernel"]
            wanted = seen.gram[:-1, :-1] @ after - seen.cross[:-1]
            slope, own = np.sum(rounded * wanted, 0), np.sum(rounded * (seen.gram[:-1, :-1] @ rounded), 0)
            if recipe.get("overrides"):  # one factor for all channels
                slope, own = slope.sum(), own.sum()
            # The float outputs as the ridge term lets weights come to them, 1 % of a channel's length away.
            assert np.all(np.abs(slope) < 1e-2 * own), layer


def test_roundings_that_are_not_searched_stay() -> None:
    base, _, _ = base_of("omse", preset="omse")
    stages = base.stages(space=block(base))
    scales = {stage.name: stage.candidate for stage in stages if stage.searchable}
    steps = steps_to_least_output_error(base, scales, [])
    assert not any(np.any(step) for step in jax.tree.leaves(steps))
