"""A run that is stopped in any writing step, and begun again, ends with the same bits as one that is not."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import pytest
from stopped_runs import CONFIG, DEEPER, Saboteur, assert_same, outcome_of

from cptv_jax import InputError, Model, Quantization, SearchConfig, load_images, quantize
from cptv_jax.config.schema import SpaceConfig
from cptv_jax.methods.base import Method
from cptv_jax.pipeline import quantize as pipeline
from cptv_jax.pipeline import search_phase
from cptv_jax.search import Guided
from cptv_jax.search.events import Accepted, Proposed
from cptv_jax.search.proposals import gradient


def calls(model: Model, folders: tuple[Path, Path]) -> Callable[[Path], Quantization]:
    calibration, test = (
        load_images(str(folder), DEEPER.preprocessing, labels=labels, progress=False)
        for folder, labels in zip(folders, (False, True), strict=True)
    )
    return lambda out: quantize(model, calibration, CONFIG, out=out, evaluation=test)


@pytest.fixture
def call(model: Model, folders: tuple[Path, Path]) -> Callable[[Path], Quantization]:
    """A run of two searched blocks."""
    return calls(model, folders)


@pytest.fixture
def call_small(small_model: Model, folders: tuple[Path, Path]) -> Callable[[Path], Quantization]:
    """A run of the model that other tests compile too."""
    return calls(small_model, folders)


@pytest.mark.slow
def test_a_kill_in_any_writing_step_leaves_a_run_that_goes_on(
    call: Callable[[Path], Quantization], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outcome = call(tmp_path / "whole")
    expected = outcome_of(tmp_path / "whole")
    assert any(isinstance(event, Accepted) for event in outcome.log)  # else scales would be equal anyhow
    saboteur = Saboteur(tmp_path / "killed", monkeypatch)
    saboteur.go_on_until_done(lambda: call(tmp_path / "killed"))
    assert sum(label.startswith("replace log.jsonl") for label in saboteur.done) == 5
    assert sum(label.startswith("replace state/state.json") for label in saboteur.done) == 5
    assert sum(label.startswith("replace results.json") for label in saboteur.done) == 3
    for step in ("replace", "unlink"):  # parts of the state, written before it names them and removed after
        assert any(label.startswith(f"{step} state/") and ".npz " in label for label in saboteur.done)
    saboteur.assert_struck(
        "replace run.json",
        "replace config.yaml",
        "save .base.tmp/arrays",
        "replace base",
        "replace log.jsonl",
        "replace state/state.json",
        "save .model.tmp/arrays",
        "replace model",
        "replace results.json",
        "replace loss.png",
        "replace report.md",
    )
    assert_same(tmp_path / "killed", expected)


@pytest.mark.slow
def test_a_guided_run_goes_on_from_within_a_proposal(
    model: Model, folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gradient, "_SAVED_EVERY", 2)
    searching = SearchConfig(strategy=Guided(steps=5, batch=4), space=SpaceConfig(sites=("*",)))
    images = load_images(str(folders[0]), DEEPER.preprocessing, labels=False, progress=False)

    def call(out: Path) -> Quantization:
        return quantize(model, images, replace(CONFIG, search=searching), out=out)

    outcome = call(tmp_path / "whole")
    taken = [event.fraction for event in outcome.log if isinstance(event, Proposed)]
    assert any(taken) and len(taken) == 3  # two openings and the proposal
    saboteur = Saboteur(tmp_path / "killed", monkeypatch, only="replace state/state.json")
    saboteur.go_on_until_done(lambda: call(tmp_path / "killed"))
    assert (
        len(saboteur.done) == 1 + 2 + 2 + 1 + 4
    )  # the start, openings, states within the proposal, its end and the stages
    assert_same(tmp_path / "killed", outcome_of(tmp_path / "whole"))


@pytest.mark.slow
def test_an_unfinished_run_is_not_continued_with_other_versions(
    call_small: Callable[[Path], Quantization], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    call_small(tmp_path / "run")
    known = tmp_path / "run" / "run.json"
    begun = json.loads(known.read_text())
    known.write_text(json.dumps({**begun, "versions": {**begun["versions"], "jax": "0.1.2", "python": "3.1"}}))
    call_small(tmp_path / "run")  # what is finished stays so
    shutil.rmtree(tmp_path / "run" / "model")
    with pytest.raises(InputError, match=r"unfinished run of other versions \(jax: 0\.1\.2 there, .* here\)"):
        call_small(tmp_path / "run")
    known.write_text(json.dumps(begun))
    call_small(tmp_path / "run")


def test_a_finished_run_is_not_computed_again(call_small: Callable[[Path], Quantization], tmp_path: Path) -> None:
    first = call_small(tmp_path / "run")
    expected = outcome_of(tmp_path / "run")

    def fail(*args: Any, **kwargs: Any) -> NoReturn:
        raise AssertionError("computed again")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Method, "quantize", fail)
        patch.setattr(search_phase, "run_search", fail)
        patch.setattr(pipeline, "evaluate", fail)
        second = call_small(tmp_path / "run")
    assert_same(tmp_path / "run", expected)
    assert second.results == first.results
    assert second.log == first.log
