"""A base method and a strategy of a user's own, with options of their own, through everything that the library does."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import PyTree
from pydantic import Field
from tiny_vit import TINY

from cptv_jax import (
    CalibrationConfig,
    InputError,
    Model,
    QuantizeConfig,
    QuantizedModel,
    RecipeConfig,
    SearchConfig,
    load_config,
    load_images,
    load_model,
    quantize,
    save_model,
)
from cptv_jax.bench import worker
from cptv_jax.bench.children import Children
from cptv_jax.bench.methods import Options, bench_methods
from cptv_jax.bench.worker import Task, measure
from cptv_jax.cli.flags import choose, override
from cptv_jax.cli.quantize import parser_for
from cptv_jax.methods.base import Method
from cptv_jax.methods.registry import METHODS, register_method
from cptv_jax.options import options
from cptv_jax.search import ClosedForms, Defaults, StageContext, Strategy, register_strategy
from cptv_jax.search.events import PassEnd, Proposed


@options
class StretchedOptions:
    """OMSE with scales that are stretched."""

    name: ClassVar[str] = "stretched"
    stretch: float = Field(default=1.5, gt=0)
    """By which scales are multiplied."""


def quantize_stretched(
    model: Model, batches: Any, recipe: Any, key: Any, on_progress: Any, options: StretchedOptions
) -> QuantizedModel:
    plain = METHODS["omse"].quantize(model, batches, recipe, key, on_progress)
    stretched = {site: q.with_scale(q.scale * options.stretch) for site, q in plain.quantizers.items()}
    return replace(plain, quantizers=stretched)


STRETCHED = Method(StretchedOptions, quantize_stretched, presets=("omse",))


@options
class Halving(Strategy):
    """Tries steps of all scales up and down, each half of the one before."""

    name: ClassVar[str] = "halving"
    defaults: ClassVar[Defaults] = Defaults(objective="kl", sites=("blocks.*.weight",), images=8)
    passes: int = Field(default=2, ge=1)
    """Sweeps over the blocks."""
    rounds: int = Field(default=3, ge=1)
    """Halvings per block."""
    first: float = Field(default=0.4, gt=0)
    """The first step, in log-scale."""
    closed_forms: bool = False
    """Try grids in closed form before."""

    @property
    def candidates(self) -> int:
        return 2

    def proposers(self) -> tuple[ClosedForms, ...]:
        return (ClosedForms(),) if self.closed_forms else ()

    def init(self, candidate: PyTree, loss: float, context: StageContext = StageContext()) -> Any:  # noqa: B008
        return candidate, loss, self.first, context.move

    def ask(self, state: Any, key: jax.Array) -> tuple[PyTree, Any]:
        candidate, loss, step, move = state
        steps = jax.tree.map(lambda leaf: jnp.stack([jnp.full(jnp.shape(leaf), s) for s in (step, -step)]), candidate)
        return jax.vmap(move, (None, 0))(candidate, steps), (candidate, loss, step / 2, move)

    def tell(self, state: Any, population: PyTree, losses: np.ndarray) -> Any:
        candidate, loss, step, move = state
        best = int(np.argmin(losses))
        if losses[best] < loss:
            candidate, loss = jax.tree.map(lambda leaf: leaf[best], population), float(losses[best])
        return candidate, loss, step, move

    def best(self, state: Any) -> tuple[PyTree, float]:
        return state[:2]


def test_a_bench_tells_its_children_what_to_import(config: QuantizeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    task = Task("w", None, "i", "e", 0, config, Path("run"), Path("measured"))
    assert json.loads(task.to_json())["modules"] == [__name__]
    plain = replace(task, config=QuantizeConfig())
    assert json.loads(plain.to_json())["modules"] == []
    imported: list[str] = []
    monkeypatch.setattr(worker, "import_module", imported.append)
    assert Task.from_json(task.to_json()) == task and imported == [__name__]


@pytest.fixture(scope="module", autouse=True)
def registered() -> None:
    assert register_method(STRETCHED) is STRETCHED
    assert register_strategy(Halving) is Halving


@pytest.fixture(scope="module")
def config(registered: None) -> QuantizeConfig:
    return QuantizeConfig(
        method=StretchedOptions(stretch=1.8),
        recipe=RecipeConfig(weight_bits=4),
        calibration=CalibrationConfig(16, 8),
        search=SearchConfig(strategy=Halving(closed_forms=True)),
    )


@pytest.fixture(scope="module")
def model() -> Model:
    """Random weights, large enough that every image has logits of its own."""
    rng = np.random.default_rng(0)
    return Model(TINY, jax.tree.map(lambda a: a + 0.2 * rng.standard_normal(a.shape, np.float32), TINY.initialize(0)))


def images(split: str, count: int) -> Any:
    return load_images(f"digits:{split}", TINY.preprocessing, labels=split == "test", limit=count)


def test_they_are_read_from_yaml_and_refused_as_the_librarys_own(config: QuantizeConfig, tmp_path: Path) -> None:
    text = """
method: {name: stretched, stretch: 1.8}
recipe: {weight_bits: 4}
calibration: {images: 16, batch: 8}
search:
  strategy: {name: halving, closed_forms: true}
"""
    (tmp_path / "c.yaml").write_text(text)
    assert load_config(tmp_path / "c.yaml") == config
    for wrong, says in (
        ("stretch: 0", r"method\.stretch is 0; it must be greater than 0"),
        ("strech: 2", r"unknown field 'method\.strech'; did you mean 'stretch'\?"),
    ):
        (tmp_path / "c.yaml").write_text(text.replace("stretch: 1.8", wrong))
        with pytest.raises(InputError, match=says):
            load_config(tmp_path / "c.yaml")
    with pytest.raises(InputError, match="there is a base method 'stretched' already"):
        register_method(replace(STRETCHED))


def test_they_have_flags_and_help() -> None:
    start = choose(QuantizeConfig(), ["--method", "stretched", "--search.strategy=halving"])
    text = " ".join(parser_for(start).format_help().split())
    assert "--method.stretch X By which scales are multiplied. (default: 1.5)" in text
    assert "search.strategy halving: Tries steps of all scales up and down" in text
    changed = override(start, {"method.stretch": "2", "search.strategy.first": "0.1"})
    assert (changed.method, changed.search.strategy) == (StretchedOptions(stretch=2.0), Halving(first=0.1))


def test_they_quantize_search_save_report_and_go_on(model: Model, config: QuantizeConfig, tmp_path: Path) -> None:
    calibration, test = images("calibration", 16), images("test", 8)
    whole = quantize(model, calibration, config, out=tmp_path / "run", evaluation=test)
    assert isinstance(whole.log[-1], PassEnd) and whole.log[-1].number == 2 and whole.log[-1].loss < whole.log[0].loss
    assert any(isinstance(event, Proposed) for event in whole.log)  # the closed forms
    assert whole.log[-1].evaluations == 1 + 2 + 2 * TINY.config.depth * 3 * 2  # start, closed form, passes
    assert (whole.config.search.judge.objective, whole.config.search.judge.images) == ("kl", 8)
    assert "# tiny_vit, stretched, recipe omse" in (tmp_path / "run" / "report.md").read_text()
    assert set(whole.results) == {"float", "base", "final"}
    # The options act.
    plain = quantize(model, calibration, replace(config, method="omse", search=SearchConfig(strategy="none")))
    site = "blocks.0.attn.qkv.weight"
    np.testing.assert_allclose(whole.base.quantizers[site].scale, 1.8 * plain.model.quantizers[site].scale, rtol=1e-6)

    class Stopped(Exception):
        pass

    def stop(name: str) -> None:
        if name == "search":
            raise Stopped

    with pytest.raises(Stopped):
        quantize(model, calibration, config, out=tmp_path / "again", evaluation=test, on_phase=stop)
    again = quantize(model, calibration, config, out=tmp_path / "again", evaluation=test)
    assert again.log == whole.log and again.results == whole.results
    saved = load_model(str(tmp_path / "again"))
    assert isinstance(saved, QuantizedModel)
    for one, other in zip(
        jax.tree.leaves(dict(saved.quantizers)), jax.tree.leaves(dict(whole.model.quantizers)), strict=True
    ):
        np.testing.assert_array_equal(one, other)


def test_they_are_benched(model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In this process: a child would have to import what registers them."""

    def run(children: Children, task: Task, log: Path) -> tuple[int, str]:
        task.measured.write_text(json.dumps(measure(Task.from_json(task.to_json()))))
        return 0, ""

    monkeypatch.setattr(Children, "run", run)
    save_model(tmp_path / "tiny", model)
    asked = Options(
        str(tmp_path / "tiny"), "digits:calibration", "digits:test", tmp_path / "out", None, ("stretched",), ("W4A8",),
        16, 8, 4, (0,), SearchConfig(strategy=Halving(passes=1)), QuantizeConfig(method=StretchedOptions(stretch=1.2)),
    )  # fmt: skip
    base, final = bench_methods(asked, progress=False)
    assert (base["method"], base["search"], final["search"]) == ("stretched", "none", "halving")
    (row,) = (tmp_path / "out" / "runs").glob("*.json")
    assert json.loads(row.read_text())["config"]["method"] == {"name": "stretched", "stretch": 1.2}


def test_what_is_not_registered_is_no_choice() -> None:
    @options
    class Unknown(Strategy):
        name: ClassVar[str] = "unknown"
        passes: int = 1
        rounds: int = 1

    with pytest.raises(InputError, match=r"strategy must be a strategy, or a mapping with its name"):
        SearchConfig(strategy=Unknown())
