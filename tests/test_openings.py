"""What a guided search tries before gradients: grids and roundings in closed form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cptv_jax import Model, RecipeConfig, resolve
from cptv_jax.demo import DIGITS_VIT
from cptv_jax.interpreters import effective_weight, quantize_weight
from cptv_jax.methods import METHODS
from cptv_jax.methods.moments import Moments, collect_moments, extended, layers_of
from cptv_jax.models.architecture import sites_of
from cptv_jax.openings import steps_to_least_error, steps_to_least_output_error
from cptv_jax.quantized import QuantizedModel, move_candidate
from cptv_jax.search.run import Scales

LAYERS = ("attn.qkv", "mlp.fc2")


def base_of(method: str, **recipe: object) -> tuple[QuantizedModel, Scales, jax.Array]:
    """A 3-bit model, the candidates of its first block, and the images that it was calibrated on."""
    model = Model(DIGITS_VIT, DIGITS_VIT.initialize(0))
    images = jnp.asarray(np.random.default_rng(0).normal(size=(4, 32, 32, 3)).astype(np.float32))
    resolved = resolve(RecipeConfig(weight_observer="minmax", weight_bits=3, **recipe), sites_of(DIGITS_VIT))  # type: ignore[arg-type]
    base = METHODS[method].quantize(model, [images], resolved, jax.random.key(0))
    stages = base.stages(lambda site: site.startswith("blocks.0."), shifted=True, turned=True)
    return base, {stage.name: stage.candidate for stage in stages if stage.searchable}, images


def moved_by(base: QuantizedModel, scales: Scales, steps: Scales) -> QuantizedModel:
    assert set(steps) == set(scales) and set(steps["blocks.0"]) == set(scales["blocks.0"])
    there = move_candidate(scales["blocks.0"], steps["blocks.0"])
    return base.with_parameters({f"blocks.0.{key}": value for key, value in there.items()})


def output_error(model: QuantizedModel, base: QuantizedModel, name: str, moments: Moments) -> float:
    """Squared error of a layer's output on quantized inputs, less a number that is the same for all models."""
    own = model.model.layer(name)  # with the bias that moved
    weight = effective_weight(quantize_weight(model.quantizers[f"{name}.weight"], own["kernel"]))
    whole = np.asarray(extended(base.model.layer(name)), np.float64)
    change = np.concatenate([np.asarray(weight), np.asarray(own["bias"])[None]]) - whole
    gram, cross = np.asarray(moments.gram, np.float64), np.asarray(moments.cross, np.float64)
    return float(np.einsum("io,ij,jo->", change, gram, change) - 2 * np.sum(change * cross))


def test_steps_to_least_error_lead_to_weights_nearer_to_the_float_ones() -> None:
    base, scales, _ = base_of("omse", preset="omse")
    steps = steps_to_least_error(base, scales)
    for key, step in steps["blocks.0"].items():
        assert key.rpartition(".weight")[1] or not np.any(step)  # activations stay
    moved = moved_by(base, scales, steps)
    for layer in LAYERS:
        kernel = base.model.layer(f"blocks.0.{layer}")["kernel"]

        def error(quantized: QuantizedModel, kernel: jax.Array = kernel, layer: str = layer) -> np.ndarray:
            quantizer = quantized.quantizers[f"blocks.0.{layer}.weight"]
            return np.mean((quantizer.values(quantizer.codes(kernel)) - kernel) ** 2, 0)

        assert np.all(error(moved) <= error(base) * (1 + 1e-5))  # of every channel; ties differ in the last place
        assert error(moved).mean() < 0.95 * error(base).mean()


@pytest.mark.parametrize(("method", "preset"), [("omse", "omse"), ("fq-vit", "evol-q")])
def test_steps_to_least_output_error_keep_more_of_what_layers_give(method: str, preset: str) -> None:
    base, scales, images = base_of(method, preset=preset)
    layers = [layer for layer in layers_of(base.model, base.recipe) if layer.name.startswith("blocks.0.")]
    moments = collect_moments(base.model, [images], layers, base.quantizers)
    steps = steps_to_least_output_error(base, scales, [images])["blocks.0"]
    for key, step in steps.items():
        assert (key.endswith((".rounding", ".factor", ".bias"))) == bool(np.any(step)), key
    moved = moved_by(base, scales, {"blocks.0": steps})
    for layer in LAYERS:
        name = f"blocks.0.{layer}"
        assert output_error(moved, base, name, moments[name]) < 0.5 * output_error(base, base, name, moments[name]), (
            layer
        )


def test_roundings_that_are_not_searched_stay() -> None:
    base, _, _ = base_of("omse", preset="omse")
    stages = base.stages(lambda site: site.startswith("blocks.0."), shifted=True)
    scales = {stage.name: stage.candidate for stage in stages if stage.searchable}
    steps = steps_to_least_output_error(base, scales, [])
    assert not any(np.any(step) for step in jax.tree.leaves(steps))
