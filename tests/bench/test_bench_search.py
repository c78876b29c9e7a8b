"""`cptv bench search`: strategies at several budgets, gains over the base of the same seed."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tiny_vit import TINY

from cptv_jax import InputError, Model, QuantizeConfig, SearchConfig, save_model
from cptv_jax.bench.children import Children
from cptv_jax.bench.harness import Source
from cptv_jax.bench.search import SearchOptions, _runs, bench_search, lines_of, markdown
from cptv_jax.bench.table import Cell
from cptv_jax.bench.worker import measure
from cptv_jax.config.schema import CalibrationConfig
from cptv_jax.options import to_mapping
from cptv_jax.search import Generational


def cell(label: str, seed: int, base: float, final: float, steps: int = 60, bits: str = "W3A8") -> Cell:
    measured: dict[str, Any] = {
        "done": True,
        "accuracy": {"base": {"top1": base, "images": 500}, "final": {"top1": final, "images": 500}},
        "objective": {"base": 20.0, "final": 19.0 + seed},
        "kl": {"base": 1.0, "final": 0.5},
        "phases": {"base": {"seconds": 5.0}, "search": {"seconds": 10.0 * (seed + 1)}},
        "evaluations": 7,
        "gradient_steps": steps,
    }
    return Cell(bits, label, seed, "guided", measured)


def rows(cells: Sequence[Cell]) -> list[list[str]]:
    _, _, *lines = markdown(lines_of(cells)).splitlines()
    return [[field.strip() for field in line.strip("|").split("|")] for line in lines]


def test_lines_have_means_and_deviations_and_gains_over_the_base_of_the_same_seed() -> None:
    base, search = rows([cell("guided, 1 pass", 0, 50.0, 60.0), cell("guided, 1 pass", 1, 54.0, 62.0)])
    assert base == [
        "W3A8", "base", "", "", "5 ± 0", "52.00 ± 2.83", "", "20.0000 ± 0.0000", "1.0000 ± 0.0000",
        "0 1", "",
    ]  # fmt: skip
    assert search == [
        "W3A8", "guided, 1 pass", "7 ± 0", "60 ± 0", "15 ± 7", "61.00 ± 1.41", "9.00 ± 1.41", "19.5000 ± 0.7071",
        "0.5000 ± 0.0000", "0 1", "",
    ]  # fmt: skip


def test_a_width_has_its_base_once_and_a_run_that_failed_says_why() -> None:
    failed = Cell("W3A8", "evol-q, 2 passes", 0, "evol-q", {}, "failed: no room")
    found = rows([cell("guided, 1 pass", 0, 50.0, 60.0), failed, cell("guided, 1 pass", 0, 80.0, 81.0, bits="W4A8")])
    assert [line[:2] for line in found] == [
        ["W3A8", "base"], ["W3A8", "guided, 1 pass"], ["W3A8", "evol-q, 2 passes"],
        ["W4A8", "base"], ["W4A8", "guided, 1 pass"],
    ]  # fmt: skip
    assert found[2][-1] == "seed 0: failed: no room"


def test_seconds_of_a_resumed_run_are_a_lower_bound() -> None:
    resumed = cell("guided, 1 pass", 0, 50.0, 60.0)
    resumed.measured["phases"]["search"]["resumed"] = True
    base, search = rows([resumed])
    assert base[4] == "5" and search[4] == "at least 10"


@pytest.fixture
def options(tmp_path: Path) -> SearchOptions:
    save_model(tmp_path / "tiny", Model(TINY, TINY.initialize(0)))
    source = Source(str(tmp_path / "tiny"), "digits:calibration", "digits:test", held_out=4)
    config = QuantizeConfig(calibration=CalibrationConfig(16, 8))
    return SearchOptions(source, tmp_path / "out", ("evol-q",), ("W3A8",), (1, 2), (0, 3), config)


def test_every_strategy_budget_and_seed_is_a_run(options: SearchOptions, monkeypatch: pytest.MonkeyPatch) -> None:
    tasks = []

    def run(children: Children, task: Any, log: Path) -> tuple[int, str]:
        tasks.append(task)
        return 1, "not run"

    monkeypatch.setattr(Children, "run", run)
    bench_search(replace(options, searches=("evol-q", "generational")), progress=False)
    asked = [(t.config.search.strategy.name, t.config.search.strategy.passes, t.config.seed) for t in tasks]
    assert asked == [(s, p, seed) for seed in (0, 3) for s in ("evol-q", "generational") for p in (1, 2)]
    assert len({t.run for t in tasks}) == len(tasks)


def test_a_bench_goes_on_with_seeds_that_come_before_its_first(
    options: SearchOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Children, "run", lambda children, task, log: (1, "not run"))
    for seeds in ((1, 2), (0, 1, 2)):  # every seed draws other images
        bench_search(replace(options, seeds=seeds), progress=False)


@pytest.mark.slow
def test_evaluations_seconds_and_versions_are_the_runs_own(
    options: SearchOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    def here(children: Children, task: Any, log: Path) -> tuple[int, str]:
        task.measured.write_text(json.dumps(measure(task)))
        return 0, ""

    monkeypatch.setattr(Children, "run", here)
    base, one, two = bench_search(replace(options, seeds=(0,)), progress=False)
    assert base["search"] == "base" and base["evaluations"] == base["gradient_steps"] == [0]
    assert one["evaluations"] == [1 + 3] and two["evaluations"] == [1 + 2 * 3]  # the start, and three cycles a pass
    assert one["seconds"][0] > 0
    assert (options.out / "search.md").read_text().count("evol-q") == 2
    [path, _] = sorted((options.out / "runs").glob("*.json"))
    found = json.loads(path.read_text())
    earlier = {**found["versions"], "jax": "0.1.2"}
    path.write_text(json.dumps({**found, "versions": earlier}))
    bench_search(replace(options, seeds=(0,)), progress=False)  # measures nothing again
    assert json.loads((options.out / "search.json").read_text())["versions"] == [earlier, found["versions"]]


def test_a_yaml_file_gives_a_search_of_its_name(options: SearchOptions, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("search: {strategy: {name: generational, children: 3}}\n")
    (run, _) = _runs(replace(options, searches=(str(tmp_path / "mine.yaml"),)), 0)
    assert run.label == "mine, 1 pass"
    assert to_mapping(run.config.search) == to_mapping(SearchConfig(strategy=Generational(children=3, passes=1)))


def test_every_objective_is_a_run_with_the_output_that_it_names(options: SearchOptions) -> None:
    found = _runs(replace(options, passes=(1,), objectives=("kl", "kl+cosine@features")), 0)
    assert [run.label for run in found] == ["evol-q, kl, 1 pass", "evol-q, kl+cosine@features, 1 pass"]
    searches = [run.config.search for run in found]
    assert [(s.judge.objective, s.judge.on, s.strategy.passes) for s in searches] == [
        ("kl", "logits", 1),
        ("kl+cosine", "features", 1),
    ]
    assert len({run.name for run in found}) == 2
    (proposed,) = _runs(replace(options, searches=("guided:1",), objectives=("infonce/kl",)), 0)
    assert (proposed.config.search.strategy.objective, proposed.config.search.judge.objective) == ("infonce", "kl")
    with pytest.raises(InputError, match="did you mean 'infonce'"):
        bench_search(replace(options, searches=("guided",), objectives=("infonse/kl",)))
    with pytest.raises(InputError, match="evol-q differentiates nothing; leave out infonce/"):
        bench_search(replace(options, objectives=("infonce/kl",)))
    with pytest.raises(InputError, match="did you mean 'cosine'"):
        bench_search(replace(options, objectives=("cosin",)))
    with pytest.raises(InputError, match="did you mean 'features'"):
        bench_search(replace(options, objectives=("kl@feature",)))


def test_unknown_searches_and_budgets_are_refused(options: SearchOptions) -> None:
    with pytest.raises(InputError, match="did you mean 'evol-q'"):
        bench_search(replace(options, searches=("evolq",)))
    with pytest.raises(InputError, match=r"--searches has 'none'; known: evol-q, evosax, generational, guided"):
        bench_search(replace(options, searches=("none",)))
    for change in ({"passes": (0, 1)}, {"searches": ("evol-q:0",)}):
        with pytest.raises(InputError, match="a search of 0 passes is asked for; give 1 or more"):
            bench_search(replace(options, **change))


def test_a_search_may_have_passes_of_its_own(options: SearchOptions) -> None:
    found = _runs(replace(options, searches=("evol-q:7", "generational")), 0)
    assert [run.label for run in found] == ["evol-q, 7 passes", "generational, 1 pass", "generational, 2 passes"]
    assert [run.config.search.strategy.passes for run in found] == [7, 1, 2]


def test_a_file_that_names_passes_has_these_alone(options: SearchOptions, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(
        "search: {strategy: {name: evol-q, passes: 10}}\n"
    )  # also where it is the default
    found = _runs(replace(options, searches=(str(tmp_path / "mine.yaml"),)), 0)
    assert [run.label for run in found] == ["mine, 10 passes"]
