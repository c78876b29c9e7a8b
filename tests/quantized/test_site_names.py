"""Names of sites are keys: a model may call its sites like the fields of a candidate, or like weights."""

from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from cptv_jax import Model, load_model, save_model
from cptv_jax.calibration.statistics import calibrate
from cptv_jax.interpreters import Operations, Tensor
from cptv_jax.models.architecture import Architecture, sites_of
from cptv_jax.models.family import Family, register_family
from cptv_jax.models.layers import Linear
from cptv_jax.models.preprocessing import Preprocessing
from cptv_jax.quantized.candidate import Space
from cptv_jax.quantized.execution import Differentiable, Execution, Simulated
from cptv_jax.quantized.model import QuantizedModel
from cptv_jax.quantizers import Free, free_to_plain
from cptv_jax.recipe.resolve import RecipeConfig, resolve
from cptv_jax.runtime.forward import forward
from cptv_jax.runtime.stages import Output
from cptv_jax.search import Evaluator, Generational, Objective
from cptv_jax.search.loop import Hooks, Search, run_search
from cptv_jax.search.state import SearchState, initial_state
from cptv_jax.storage.run_directory import RunDirectory

FIELDS = ("bias", "start", "factor", "rounding", "exponents", "zero_point")


@dataclass(frozen=True)
class Config:
    """Sizes of the model below."""

    width: int = 8


class Position(nnx.Module):
    """A linear layer called "bias", as one of relative positions may be."""

    def __init__(self, width: int, *, rngs: nnx.Rngs) -> None:
        self.bias = Linear(width, width, rngs=rngs)


class Stem(nnx.Module):
    """Tensors with the names of a candidate's fields, and one with that of a weight."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs) -> None:
        self.fc = Linear(3, config.width, rngs=rngs)
        self.relative_position = Position(config.width, rngs=rngs)

    def __call__(self, ops: Operations, images: Tensor) -> Tensor:
        x = ops.tensor("input", images).move(lambda a: a.reshape(a.shape[0], -1, 3))
        x = self.fc(ops, "fc", x)
        x = self.relative_position.bias(ops, "relative_position.bias", x)
        for field in FIELDS:
            x = ops.tensor(f"fc.{field}", Tensor(x.values + 0.1))
        return ops.tensor("gate.weight", Tensor(x.values * 2))


class Head(nnx.Module):
    """Logits of the mean token."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs) -> None:
        self.fc = Linear(config.width, 5, rngs=rngs)

    def __call__(self, ops: Operations, x: Tensor) -> Output:
        features = ops.tensor("mean", Tensor(jnp.mean(x.values, 1)))
        return Output(features.values, self.fc(ops, "fc", features).values)


class Named(nnx.Module):
    """Two stages, of which one's name begins with the other's."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs) -> None:
        self.first, self.second = Stem(config, rngs=rngs), Head(config, rngs=rngs)

    def stages(self) -> dict[str, nnx.Module]:
        return {"stem": self.first, "stem.head": self.second}


NAMED = register_family(Family("of-site-names", Config, Named, weight_table=lambda config: []))
LOCAL = {"input", "fc", "fc.weight", "relative_position.bias", "relative_position.bias.weight", "gate.weight"} | {
    f"fc.{field}" for field in FIELDS
}


@pytest.fixture
def model() -> tuple[QuantizedModel, np.ndarray]:
    architecture = Architecture("named", NAMED, Config(), Preprocessing(image_size=4))
    sites = sites_of(architecture)
    recipe = resolve(RecipeConfig(preset="evol-q", weight_bits=4, activation_observer="minmax"), sites)
    images = np.random.default_rng(0).normal(size=(8, 4, 4, 3)).astype(np.float32)
    plain = Model(architecture, architecture.initialize(0))
    return QuantizedModel(plain, recipe, calibrate(plain, [jnp.asarray(images)], recipe)), images


@pytest.mark.parametrize("execution", [Simulated("float32"), Differentiable("float32")])
def test_every_site_is_moved_by_its_own_entry_alone(
    model: tuple[QuantizedModel, np.ndarray], execution: Execution
) -> None:
    quantized, images = model
    assert {f"stem.{local}" for local in LOCAL} == {s for s in quantized.quantizers if not s.startswith("stem.head.")}
    space = Space(quantized.quantizers, offsets=True, rounding=True)
    stages = quantized.stages(execution, space)
    candidate = stages[0].candidate
    assert set(candidate) == LOCAL
    for site, free in candidate.items():
        weight = site in ("fc.weight", "relative_position.bias.weight")
        assert (free.bias is not None) == (free.rounding is not None) == weight, site
        moved = {site: free.move(jax.tree.map(lambda leaf: jnp.full_like(leaf, 0.2), free))}
        other = quantized.with_candidates({"stem": moved})
        changed = {
            name
            for name, quantizer in quantized.quantizers.items()
            if jax.tree.structure(quantizer) != jax.tree.structure(other.quantizers[name])  # type: ignore[operator]
            or any(map(np.any, jax.tree.leaves(jax.tree.map(np.not_equal, quantizer, other.quantizers[name]))))
        }
        assert changed == {f"stem.{site}"}
        if weight:
            layer = f"stem.{site}".removesuffix(".weight")
            assert np.all(other.model.layer(layer)["bias"] != quantized.model.layer(layer)["bias"])
    moved = stages[0].move(candidate, jax.tree.map(lambda leaf: jnp.full_like(leaf, 0.1), candidate))
    bound = forward([stages[0].with_candidate(moved), *stages[1:]], images).logits
    expected = forward(quantized.with_candidates({"stem": moved}).stages(Simulated("float32")), images).logits
    np.testing.assert_allclose(bound, expected, rtol=0, atol=1e-6)  # weights in float32, in one program or another


def test_such_a_model_is_searched_saved_and_continued(model: tuple[QuantizedModel, np.ndarray], tmp_path: Path) -> None:
    quantized, images = model
    stages = quantized.stages(Simulated("float32"), Space(quantized.quantizers))
    teacher = forward(quantized.model.stages(), images)
    run = RunDirectory(tmp_path / "run", {"config": {}})
    kept: list[SearchState] = []

    def search(state: SearchState | None, passes: int) -> SearchState:
        judge = Evaluator(stages, [images], [teacher], Objective("mse", "logits", 1.0))
        strategy = Generational(passes=passes, rounds=1, children=2, survivors=1, sigma=0.1)
        start = state or initial_state(judge)
        return run_search(judge, Search(strategy, jax.random.key(0)), start, Hooks(on_stage=run.save_state))

    whole = search(None, 2)
    again = RunDirectory(tmp_path / "run", {"config": {}})
    kept.append(search(None, 1))
    restored = again.state()
    assert restored is not None and isinstance(restored.scales["stem"]["fc.bias"], Free)
    assert jax.tree.structure(restored.scales) == jax.tree.structure(kept[0].scales)  # type: ignore[operator]
    finished = search(restored, 2)
    jax.tree.map(np.testing.assert_array_equal, free_to_plain(finished.scales), free_to_plain(whole.scales))
    found = quantized.with_candidates(finished.scales)
    save_model(tmp_path / "model", found)
    loaded = load_model(str(tmp_path / "model"))
    np.testing.assert_array_equal(
        forward(loaded.stages(Simulated("float32")), images).logits,
        forward(found.stages(Simulated("float32")), images).logits,
    )
