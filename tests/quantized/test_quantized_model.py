"""Quantized models: what a candidate may change of them, and that it is the same in a stage and in a model."""

from dataclasses import dataclass, replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cptv_jax import InputError, Model, RecipeConfig, load_model, resolve, save_model
from cptv_jax.demo import DIGITS_VIT
from cptv_jax.methods.registry import METHODS
from cptv_jax.models.architecture import sites_of
from cptv_jax.quantized.candidate import Space
from cptv_jax.quantized.execution import Differentiable, Execution, Simulated, Unrounded
from cptv_jax.quantized.model import QuantizedModel
from cptv_jax.quantizers import QUANTIZER_CLASSES, Free, ScaledQuantizer, register_quantizer, unwrap
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


def first_block(model: QuantizedModel, offsets: bool = False) -> Space:
    return Space([site for site in model.quantizers if site.startswith("blocks.0.")], offsets=offsets)


@pytest.mark.slow
def test_a_bias_is_offered_with_the_other_offsets_of_weights_alone(model: QuantizedModel) -> None:
    (stage,) = [s for s in model.stages(space=first_block(model, offsets=True)) if s.searchable]
    biases = {site: free.bias for site, free in stage.candidate.items() if free.bias is not None}
    layers = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    assert set(biases) == {f"{layer}.weight" for layer in layers}
    assert not any(np.any(bias) for bias in biases.values())  # from where it is
    scales_alone = model.stages(space=first_block(model))
    assert all(free.names == ("scale",) for stage in scales_alone for free in stage.candidate.values())


def test_a_step_of_a_bias_is_a_tenth_of_the_length_of_its_outputs_weights(model: QuantizedModel) -> None:
    kernel, bias = (np.asarray(model.model.layer("blocks.1.attn.qkv")[name]) for name in ("kernel", "bias"))
    steps = np.linspace(-1, 1, len(bias)).astype(np.float32)
    moved = model.with_candidates({"blocks.1": {QKV: Free(bias=jnp.asarray(steps))}})
    expected = bias + 0.1 * steps * np.sqrt(np.sum(kernel.astype(np.float64) ** 2, 0))
    # Products of float32 numbers of this size.
    np.testing.assert_allclose(moved.model.layer("blocks.1.attn.qkv")["bias"], expected, rtol=1e-6, atol=1e-7)
    np.testing.assert_array_equal(
        moved.model.layer("blocks.0.attn.qkv")["bias"], model.model.layer("blocks.0.attn.qkv")["bias"]
    )
    np.testing.assert_array_equal(model.model.layer("blocks.1.attn.qkv")["bias"], bias)


@pytest.mark.slow
@pytest.mark.parametrize("execution", [Simulated(), Differentiable()])
def test_a_candidate_computes_what_the_model_with_its_values_does(
    model: QuantizedModel, images: np.ndarray, execution: Execution
) -> None:
    weights = [site.name for site in sites_of(DIGITS_VIT) if site.role == "weight"]
    stages = model.stages(execution, Space(weights, offsets=True, rounding=True))
    rng = np.random.default_rng(1)
    bound, candidates = [], {}

    def random_steps(free: Free) -> Free:
        sizes = {name: 0.2 if name == "rounding" else 0.02 for name in free.names}  # units of two steps
        shapes = {name: np.shape(getattr(free, name)) for name in free.names}
        return Free(**{name: jnp.float32(size * rng.normal(size=shapes[name])) for name, size in sizes.items()})

    for stage in stages:
        if stage.searchable:
            assert all(free.rounding.ndim == 2 for free in stage.candidate.values())
            steps = {site: random_steps(free) for site, free in stage.candidate.items()}
            candidates[stage.name] = candidate = stage.move(stage.candidate, steps)
            # Whatever was bound before: only the last candidate counts.
            stage = stage.with_candidate(stage.move(candidate, steps)).with_candidate(candidate)
        bound.append(stage)
    moved = model.with_candidates(candidates)
    assert not np.array_equal(forward(model.stages(), images).logits, forward(moved.stages(), images).logits)
    # The derivative's stages add in another order within LayerNorm; the evaluator's are the model's own.
    tolerance = 1e-5 if execution == Differentiable() else 0
    np.testing.assert_allclose(
        forward(bound, images).logits, forward(moved.stages(), images).logits, rtol=0, atol=tolerance
    )


def test_a_learned_rounding_changes_codes_and_is_kept_with_the_model(model: QuantizedModel, tmp_path: Path) -> None:
    site = f"blocks.0.{QKV}"
    kernel = model.model.layer("blocks.0.attn.qkv")["kernel"]
    rounding = np.random.default_rng(0).normal(size=kernel.shape).astype(np.float32)
    rounded = model.with_candidates({"blocks.0": {QKV: Free(rounding=rounding / 2)}})
    before, after = (np.asarray(m.quantizers[site].codes(kernel)) for m in (model, rounded))
    assert 0.2 < np.mean(before != after) < 0.9
    save_model(tmp_path / "rounded", rounded)
    again = load_model(str(tmp_path / "rounded"))
    assert isinstance(again, QuantizedModel)
    np.testing.assert_array_equal(again.quantizers[site].codes(kernel), after)
    assert getattr(unwrap(again.quantizers[f"blocks.1.{QKV}"]), "rounding", None) is None


@pytest.mark.parametrize("execution", [Simulated(), Differentiable(), Unrounded()])
def test_one_stage_alone_is_that_of_all(model: QuantizedModel, execution: Execution) -> None:
    space = first_block(model, offsets=True)
    for whole in model.stages(execution, space):
        alone = model.stage(whole.name, execution, space)
        assert (alone.name, alone.function, alone.bind, alone.move) == (
            whole.name, whole.function, whole.bind, whole.move
        )  # fmt: skip
        one, all_of_them = (jax.tree.flatten((stage.state, stage.candidate)) for stage in (alone, whole))
        assert one[1] == all_of_them[1]  # type: ignore[operator]
        jax.tree.map(np.testing.assert_array_equal, one[0], all_of_them[0])


def test_names_that_the_model_lacks_are_refused_with_the_nearest(model: QuantizedModel) -> None:
    with pytest.raises(InputError, match=r"blocks\.0\.attn\.qvk\.weight, which is not quantized; did you mean"):
        model.stages(space=Space(["blocks.0.attn.qvk.weight"]))
    with pytest.raises(InputError, match=r"has no stage block\.1; did you mean 'blocks\.1'"):
        model.stage("block.1")
    with pytest.raises(InputError, match=r"stage blocks\.1 has no quantized site attn\.qkv\.weigth; did you mean"):
        model.with_candidates({"blocks.1": {"attn.qkv.weigth": Free(jnp.ones(3))}})
    with pytest.raises(KeyError, match="the model has no layer"):
        model.model.layer("blocks.0.attn.qvk")


def test_models_are_described_in_a_line(model: QuantizedModel) -> None:
    for text in (repr(model), repr(model.model)):
        assert "\n" not in text and len(text) < 200 and "rray" not in text
        assert model.model.architecture.name in text and "weights in" in text
    assert f"recipe {model.recipe.name}" in repr(model)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Ternary(ScaledQuantizer):
    """A user's own quantizer: -1, 0 and 1."""

    scale: jax.Array

    def codes(self, values: jax.Array) -> jax.Array:
        return jnp.clip(jnp.round(values / self.scale), -1, 1)

    def values(self, codes: jax.Array) -> jax.Array:
        return codes * self.scale


def test_a_users_own_quantizer_is_computed_searched_saved_and_loaded(
    model: QuantizedModel, images: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(QUANTIZER_CLASSES, "_known", dict(QUANTIZER_CLASSES))
    local, site = "mlp.fc2.weight", "blocks.0.mlp.fc2.weight"
    scale = 1.5 * jnp.mean(jnp.abs(model.model.layer("blocks.0.mlp.fc2")["kernel"]), 0)
    own = replace(model, quantizers={**model.quantizers, site: Ternary(scale)})
    logits = forward(own.stages(), images).logits
    assert np.isfinite(logits).all() and np.any(logits != forward(model.stages(), images).logits)
    stage = own.stage("blocks.0", Simulated(), Space([site], offsets=True, rounding=True))
    assert set(stage.candidate[local].names) == {"scale", "bias"}
    candidate = {local: Free(scale * 1.3)}
    moved = own.with_candidates({"blocks.0": candidate})
    stages = [stage.with_candidate(candidate) if s.name == "blocks.0" else s for s in own.stages()]
    np.testing.assert_array_equal(forward(stages, images).logits, forward(moved.stages(), images).logits)
    with pytest.raises(InputError, match=rf'the quantizer of {site} is a Ternary.*register_quantizer\("Ternary"'):
        save_model(tmp_path / "refused", moved)
    assert not (tmp_path / "refused").exists()
    register_quantizer("Ternary", Ternary)
    save_model(tmp_path / "own", moved)
    again = load_model(str(tmp_path / "own"))
    np.testing.assert_array_equal(forward(again.stages(), images).logits, forward(moved.stages(), images).logits)
    QUANTIZER_CLASSES._known.pop("Ternary")
    with pytest.raises(InputError, match=rf"the quantizer of {site} is of class 'Ternary', which is not registered"):
        load_model(str(tmp_path / "own"))
