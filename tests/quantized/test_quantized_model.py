"""Quantized models: what a candidate may change of them, and that it is the same in a stage and in a model."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cptv_jax import Model, RecipeConfig, load_model, resolve, save_model
from cptv_jax.demo import DIGITS_VIT
from cptv_jax.methods.registry import METHODS
from cptv_jax.models.architecture import sites_of
from cptv_jax.quantized.model import QuantizedModel
from cptv_jax.quantizers import innermost
from cptv_jax.runtime.forward import forward

QKV = "attn.qkv.weight"


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(4, 32, 32, 3)).astype(np.float32)


@pytest.fixture(scope="module")
def model(images: np.ndarray) -> QuantizedModel:
    recipe = resolve(RecipeConfig(weight_bits=3), sites_of(DIGITS_VIT))
    float_model = Model(DIGITS_VIT, DIGITS_VIT.initialize(0))
    return METHODS["fq-vit"].quantize(float_model, [jnp.asarray(images)], recipe, jax.random.key(0))


@pytest.mark.slow
def test_a_bias_is_offered_with_the_other_offsets_of_weights_alone(model: QuantizedModel) -> None:
    (stage,) = [s for s in model.stages(lambda site: site.startswith("blocks.0."), shifted=True) if s.searchable]
    biases = {key for key in stage.candidate if key.endswith(".bias")}
    layers = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    assert biases == {f"{layer}.weight.bias" for layer in layers}
    assert not any(np.any(stage.candidate[key]) for key in biases)  # from where it is
    scales_alone = model.stages(lambda site: site.startswith("blocks.0."))
    assert not any(key.endswith(".bias") for stage in scales_alone for key in stage.candidate or {})


def test_a_step_of_a_bias_is_a_tenth_of_the_length_of_its_outputs_weights(model: QuantizedModel) -> None:
    kernel, bias = (np.asarray(model.model.layer("blocks.1.attn.qkv")[name]) for name in ("kernel", "bias"))
    steps = np.linspace(-1, 1, len(bias)).astype(np.float32)
    moved = model.with_parameters({f"blocks.1.{QKV}.bias": jnp.asarray(steps)})
    expected = bias + 0.1 * steps * np.sqrt(np.sum(kernel.astype(np.float64) ** 2, 0))
    # Products of float32 numbers of this size.
    np.testing.assert_allclose(moved.model.layer("blocks.1.attn.qkv")["bias"], expected, rtol=1e-6, atol=1e-7)
    np.testing.assert_array_equal(
        moved.model.layer("blocks.0.attn.qkv")["bias"], model.model.layer("blocks.0.attn.qkv")["bias"]
    )
    np.testing.assert_array_equal(model.model.layer("blocks.1.attn.qkv")["bias"], bias)


@pytest.mark.slow
@pytest.mark.parametrize("differentiable", [False, True])
def test_a_candidate_computes_what_the_model_with_its_parameters_does(
    model: QuantizedModel, images: np.ndarray, differentiable: bool
) -> None:
    stages = model.stages(
        lambda site: site.endswith(".weight"), shifted=True, turned=True, differentiable=differentiable
    )
    rng = np.random.default_rng(1)
    bound, parameters = [], {}
    for stage in stages:
        if stage.searchable:
            assert stage.candidate[next(iter(stage.candidate)) + ".rounding"].ndim == 2
            sizes = {key: 0.2 if key.endswith(".rounding") else 0.02 for key in stage.candidate}  # units of two steps
            steps = {key: sizes[key] * rng.normal(size=np.shape(value)) for key, value in stage.candidate.items()}
            candidate = stage.move(stage.candidate, jax.tree.map(jnp.float32, steps))
            parameters |= {f"{stage.name}.{key}": value for key, value in candidate.items()}
            # Whatever was bound before: only the last candidate counts.
            stage = stage.bound(stage.move(candidate, jax.tree.map(jnp.float32, steps))).bound(candidate)
        bound.append(stage)
    moved = model.with_parameters(parameters)
    assert not np.array_equal(forward(model.stages(), images).logits, forward(moved.stages(), images).logits)
    # The derivative's stages add in another order within LayerNorm; the evaluator's are the model's own.
    tolerance = 1e-5 if differentiable else 0
    np.testing.assert_allclose(
        forward(bound, images).logits, forward(moved.stages(), images).logits, rtol=0, atol=tolerance
    )


def test_a_learned_rounding_changes_codes_and_is_kept_with_the_model(model: QuantizedModel, tmp_path: Path) -> None:
    site = f"blocks.0.{QKV}"
    kernel = model.model.layer("blocks.0.attn.qkv")["kernel"]
    rounding = np.random.default_rng(0).normal(size=kernel.shape).astype(np.float32)
    turned = model.with_parameters({f"{site}.rounding": rounding / 2})
    before, after = (np.asarray(m.quantizers[site].codes(kernel)) for m in (model, turned))
    assert 0.2 < np.mean(before != after) < 0.9
    save_model(tmp_path / "turned", turned)
    again = load_model(str(tmp_path / "turned"))
    assert isinstance(again, QuantizedModel)
    np.testing.assert_array_equal(again.quantizers[site].codes(kernel), after)
    assert getattr(innermost(again.quantizers[f"blocks.1.{QKV}"]), "rounding", None) is None
