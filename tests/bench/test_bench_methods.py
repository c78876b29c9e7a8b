"""`cptv bench methods`: each row a run of its own, measured as it says, whatever becomes of the others."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import jax.numpy as jnp
import pytest
from spoiled_inputs import paint
from tiny_vit import TINY

from cptv_jax import InputError, QuantizeConfig, SearchConfig, forward, load_images, load_model
from cptv_jax.bench import harness, methods
from cptv_jax.bench.children import Children
from cptv_jax.bench.methods import Options, bench_methods
from cptv_jax.bench.worker import Task, measure, peak_mib
from cptv_jax.cli.main import main
from cptv_jax.methods.base import Method
from cptv_jax.methods.erq import ErqOptions
from cptv_jax.methods.fq_vit import FqVitOptions
from cptv_jax.methods.registry import METHODS, register_method
from cptv_jax.options import options as options_class
from cptv_jax.options import to_mapping
from cptv_jax.reconstruction.config import ReconstructionConfig
from cptv_jax.search.objective import info_nce, kl_divergence

ROOT = Path(__file__).parents[2]


def in_this_process(task: Task, log: Path) -> tuple[int, str]:
    """What a child does, without the seconds that a process takes to begin."""
    try:
        found = measure(task)
    except InputError as error:
        found = {"refused": str(error)}
    except RuntimeError as error:
        return 1, f"{error}; see {log}"
    task.measured.write_text(json.dumps(found))
    return (2, "") if "refused" in found else (0, "")


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Runs happen in this process; their names in order."""
    names: list[str] = []

    def run(children: Children, task: Task, log: Path) -> tuple[int, str]:
        names.append(task.run.name)
        return in_this_process(task, log)

    monkeypatch.setattr(Children, "run", run)
    monkeypatch.setattr(METHODS, "_known", dict(METHODS))  # what a test registers is forgotten
    return names


def method_named(name: str, carry_out: Any) -> None:
    """Registers a method without options of its own."""
    register_method(
        Method(
            options_class(type(name, (), {"name": name, "__annotations__": {"name": ClassVar[str]}})),
            carry_out,
            ("evol-q",),
        )
    )


def without_clocks(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in line.items() if k not in ("seconds", "peak_mib", "resumed")} for line in lines]


def test_rows_hold_what_the_runs_give(options: Options, here: list[str]) -> None:
    lines = bench_methods(options, progress=False)
    assert here == ["fq-vit_W4A8_seed0"]
    base, final = lines
    run = options.out / "runs" / "fq-vit_W4A8_seed0"
    results = json.loads((run / "results.json").read_text())
    assert (base["top1"], final["top1"]) == ([results["base"]["top1"]], [results["final"]["top1"]])
    assert base["scope"] == "fully quantized" and base["recipe"] == "evol-q"
    assert base["images"] == {"base": 8, "search": 8, "held_out": 8}
    assert (base["search"], final["search"]) == ("none", "generational")
    # The objective: images that are neither the run's nor evaluated on, all rows the same.
    given = load_images("digits:calibration", TINY.preprocessing, labels=False, limit=28, seed=0)
    x = jnp.asarray(given.take(slice(16, 28)).normalize(0, 12))
    teacher = forward(load_model(options.weights).stages(), x).logits
    for line, name in ((base, "base"), (final, "model")):
        student = forward(load_model(str(run / name)).stages(), x).logits
        assert line["objective"] == [pytest.approx(float(info_nce(student, teacher, 3.0)), rel=1e-5)]  # chunked sums
        assert line["kl"] == [pytest.approx(float(kl_divergence(student, teacher, 1.0)), rel=1e-4)]
        assert line["seconds"][0] > 0 and not line["resumed"]
        assert 50 < line["peak_mib"][0] <= peak_mib()
    written = json.loads((options.out / "methods.json").read_text())
    assert written["lines"] == lines and written["float"]["images"] == 297
    assert "| W4A8 | fq-vit | evol-q | fully quantized |  |" in (options.out / "methods.md").read_text()


def test_every_run_is_one_of_cptv_quantize(
    options: Options, here: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    bench_methods(options, progress=False)
    run = options.out / "runs" / "fq-vit_W4A8_seed0"

    def times() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for name in ("metadata.json", "state.json") for path in run.rglob(name)}

    before = times()
    command = ["quantize", options.weights, "--images", "digits:calibration", "--eval", "digits:test"]
    with pytest.raises(SystemExit) as ended:
        main([*command, "--config", str(run / "config.yaml"), "--out", str(run)])
    assert ended.value.code == 0, capsys.readouterr().err
    assert times() == before
    assert len(before) == 3  # base, state, model: finished, so nothing is computed again


@pytest.mark.slow
def test_an_interrupted_bench_goes_on_and_ends_as_if_it_had_not_been(
    options: Options, here: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = replace(options, bits=("W8A8", "W4A8"), search=SearchConfig(strategy="none"))
    whole = bench_methods(replace(options, out=options.out.parent / "whole"), progress=False)
    here.clear()
    counted = Children.run

    def interrupted(children: Children, task: Task, log: Path) -> tuple[int, str]:
        if task.run.name == "fq-vit_W4A8_seed0":
            raise KeyboardInterrupt
        return counted(children, task, log)

    with monkeypatch.context() as patch:
        patch.setattr(Children, "run", interrupted)
        with pytest.raises(KeyboardInterrupt):
            bench_methods(options, progress=False)
    assert "W8A8" in (options.out / "methods.md").read_text()  # what was measured is there already
    assert without_clocks(bench_methods(options, progress=False)) == without_clocks(whole)
    assert here == ["fq-vit_W8A8_seed0", "fq-vit_W4A8_seed0"]
    bench_methods(options, progress=False)
    assert len(here) == 2


def test_a_method_that_fails_or_refuses_says_why_and_stops_no_other(
    options: Options, here: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("out of luck")

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise InputError("four bits are too few for it")

    carry_out = {"broken": fail, "picky": refuse}
    for name in carry_out:
        method_named(name, lambda *args, name=name, **kwargs: carry_out[name](*args, **kwargs))
    options = replace(
        options, methods=("broken", "picky", "fq-vit/evol-q", "fq-vit"), search=SearchConfig(strategy="none")
    )
    lines = {line["method"]: line for line in bench_methods(options, progress=False)}
    assert list(lines) == ["broken", "picky", "fq-vit/evol-q", "fq-vit"]
    assert lines["broken"]["remark"].startswith("failed: out of luck; see ")
    assert lines["picky"]["remark"] == "not possible: four bits are too few for it"
    assert lines["fq-vit/evol-q"]["top1"] == lines["fq-vit"]["top1"]  # its own preset, by name
    assert lines["fq-vit"]["remark"] == "" and lines["fq-vit"]["top1"]
    here.clear()
    carry_out["broken"] = lambda *args, options, **kwargs: METHODS["fq-vit"].carry_out(*args, **kwargs)
    again = {line["method"]: line for line in bench_methods(options, progress=False)}
    assert here == ["broken_W4A8_seed0", "picky_W4A8_seed0"]  # what failed is tried again
    assert again["broken"]["top1"] == lines["fq-vit"]["top1"] and again["broken"]["remark"] == ""


def test_a_width_that_a_method_cannot_do_is_marked_without_a_run(
    options: Options, here: list[str], tmp_path: Path
) -> None:
    (tmp_path / "percentile.yaml").write_text("recipe: {weight_observer: percentile}")
    names = ("fq-vit", str(tmp_path / "percentile.yaml"))
    options = replace(options, methods=names, search=SearchConfig(strategy="none"))
    _, marked = bench_methods(options, progress=False)
    assert here == ["fq-vit_W4A8_seed0"]
    assert marked["method"] == "percentile" and marked["remark"].startswith("not possible: embed.proj.weight: observer")


@pytest.mark.slow
def test_automatic_seeds_go_to_runs_that_are_near_another(
    options: Options, here: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two methods that are one, and a third at another width that has no rival: its search is off."""
    method_named("twin", lambda *args, options, **kwargs: METHODS["fq-vit"].carry_out(*args, **kwargs))
    options = replace(options, methods=("fq-vit", "twin"), seeds=None, search=SearchConfig(strategy="none"))
    lines = bench_methods(options, progress=False)
    assert here == [f"{name}_W4A8_seed{seed}" for seed in (0, 1, 2) for name in ("fq-vit", "twin")]
    assert [line["seeds"] for line in lines] == [[0, 1, 2], [0, 1, 2]]
    here.clear()
    alone = replace(options, methods=("fq-vit",), out=options.out.parent / "alone")
    assert [line["seeds"] for line in bench_methods(alone, progress=False)] == [[0]]
    assert len(here) == 1


@pytest.mark.slow
def test_a_method_of_a_file_that_changed_is_refused_and_so_are_two_files_of_one_name(
    options: Options, here: list[str], tmp_path: Path
) -> None:
    (tmp_path / "d").mkdir()
    first, second = tmp_path / "m.yaml", tmp_path / "d" / "m.yaml"
    first.write_text("method: omse\n")
    second.write_text("method: fq-vit\n")
    options = replace(options, methods=(str(first),), search=SearchConfig(strategy="none"))
    with pytest.raises(InputError, match="two different runs would be called m_W4A8_seed0"):
        bench_methods(replace(options, methods=(str(first), str(second))), progress=False)
    (line,) = bench_methods(options, progress=False)
    assert bench_methods(options, progress=False) == [line] and here == ["m_W4A8_seed0"]
    first.write_text("method: omse\nrecipe: {quantize_input: false}\n")
    with pytest.raises(InputError, match=r"m_W4A8_seed0.json was measured with other settings \(recipe.quantize_input"):
        bench_methods(options, progress=False)


def test_a_bench_whose_calibration_images_changed_is_refused(options: Options, here: list[str], tmp_path: Path) -> None:
    names = [f"{i:02d}.png" for i in range(28)]
    folder = paint(tmp_path / "photos", names)
    options = replace(options, images=str(folder), search=SearchConfig(strategy="none"))
    bench_methods(options, progress=False)
    paint(folder, names[::-1])
    with pytest.raises(InputError, match=r"holds a bench with other settings \(calibration images"):
        bench_methods(options, progress=False)
    assert len(here) == 1


def test_a_bench_with_other_settings_is_refused_and_one_with_more_methods_goes_on(
    options: Options, here: list[str]
) -> None:
    searching = options.search
    options = replace(options, search=SearchConfig(strategy="none"))
    bench_methods(options, progress=False)
    for change, says in (
        ({"calibration": 8}, "calibration: 16 there, 8 here"),
        ({"held_out": 10}, "held-out: 12 there, 10 here"),
        ({"search": searching}, "search.strategy.name: none there, generational here"),
    ):
        with pytest.raises(InputError, match=says):
            bench_methods(replace(options, **change), progress=False)
    bench_methods(replace(options, methods=("fq-vit", "fq-vit/evol-q")), progress=False)
    assert here == ["fq-vit_W4A8_seed0", "fq-vit-evol-q_W4A8_seed0"]


def test_reconstruction_is_asked_for_by_name_with_the_steps_of_the_configuration(options: Options) -> None:
    names = ("fq-vit", "fq-vit/fq-vit+reconstruction")
    plain, with_it = (run for run in methods._runs(replace(options, methods=names), 0))
    assert plain.config.reconstruction.steps is None
    assert with_it.name == "fq-vit-fq-vit+reconstruction_W4A8_seed0"
    assert with_it.config.recipe.preset == "fq-vit"
    assert with_it.config.reconstruction.steps == methods.RECONSTRUCTION_STEPS
    shared = replace(options.config, reconstruction=ReconstructionConfig(steps=7))
    _, with_it = (run for run in methods._runs(replace(options, methods=names, config=shared), 0))
    assert with_it.config.reconstruction.steps == 7


def test_what_all_runs_share_cannot_stand_beside_a_method_of_a_file(options: Options) -> None:
    shared = replace(options.config, reconstruction=ReconstructionConfig(steps=7))
    methods_of_both = ("fq-vit", str(ROOT / "configs" / "omse.yaml"))
    with pytest.raises(InputError, match=r"--config does not reach a method of a YAML file; write .* into that file"):
        bench_methods(replace(options, methods=methods_of_both, config=shared), progress=False)


# Bad input


BAD: dict[str, tuple[str, str, str]] = {
    "bits": ("--bits W4", "--bits has W4;", "such as W4A8"),
    "bits out of range": ("--bits W8A8 W9A8", "--bits has W9A8;", "from 2 to 8"),
    "method": ("--methods fqvit", "--methods has 'fqvit'", "did you mean 'fq-vit'?"),
    "preset": ("--methods fq-vit/evolq", "--methods has 'fq-vit/evolq'", "did you mean 'evol-q'?"),
    "addition": ("--methods fq-vit+luck", "--methods has 'fq-vit+luck'", "only +reconstruction"),
    "method file": ("--methods none.yaml", "no configuration file none.yaml", "check"),
    "seeds": ("--seeds 0 -1", "--seeds are 0 -1", "or auto"),
    "seeds in words": ("--seeds 0 auto", "--seeds are 0 auto", "or auto"),
    "batch": ("--batch 64 --calibration 32", "--batch is 64", "lower it"),
    "held out": ("--held-out 1", "--held-out is 1", "2 or more"),
    "images too few": ("--calibration 290 --held-out 100", "holds 300 images but 390", "ask for fewer"),
    "no batch to contrast": ("--batch 1 --search {configs}/evol-q_w4a8.yaml", "calibration.batch is 1", "at least 2"),
    "configuration with a search": (
        "--config {configs}/evol-q_w4a8.yaml",
        "--config sets recipe.preset",
        "use --methods NAME/PRESET",
    ),
    "search file": ("--search none.yaml", "no configuration file none.yaml", "check"),
    "evaluation": ("--eval digits:tst", "'tst'", "choose one of"),
    "evaluation images calibrate": ("--eval digits:calibration", "are calibration images too", "evaluate on others"),
    "out": ("--out {weights}", "is not empty and not a bench", "choose another directory"),
    "jobs": ("--jobs 0", "--jobs is 0", "1 or more"),
    "weights": ("--weights none.safetensors", "none.safetensors does not exist", "give the path"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_in_one_sentence_before_any_run(
    case: str, weights: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(*args: Any) -> Any:
        raise AssertionError("a run began")

    monkeypatch.setattr(Children, "run", run)
    words, what, remedy = BAD[case]
    given = [
        "--weights",
        weights,
        "--images",
        "digits:calibration",
        "--eval",
        "digits:test",
        "--out",
        str(tmp_path / "o"),
    ]
    with pytest.raises(SystemExit) as ended:
        main(["bench", "methods", *given, *words.format(weights=weights, configs=ROOT / "configs").split()])
    captured = capsys.readouterr()
    assert ended.value.code == 2 and captured.out == ""
    [line] = captured.err.strip().splitlines()
    assert line.startswith("cptv: ") and what in line and remedy in line
    assert not (tmp_path / "o").exists()


def test_bench_alone_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["bench"])
    assert ended.value.code == 2 and "see cptv bench --help" in capsys.readouterr().err


def test_options_of_the_configurations_method_are_those_of_its_runs_alone(options: Options) -> None:
    shared = replace(options.config, method=ErqOptions(flips=3))
    names = ("erq", "fq-vit", "erq/erq-uniform")
    found = [run.config.method for run in methods._runs(replace(options, methods=names, config=shared), 0)]
    assert found == [ErqOptions(flips=3), FqVitOptions(), ErqOptions(flips=3)]
    with pytest.raises(InputError, match="--config has options of erq, which is not among --methods"):
        methods._runs(replace(options, methods=("fq-vit",), config=shared), 0)
    with pytest.raises(InputError, match="--config sets method, which a bench has an option of its own for"):
        methods._runs(replace(options, config=replace(options.config, method=ErqOptions())), 0)


def test_rows_and_benches_of_an_older_form_are_read(options: Options) -> None:
    """The rows that the repository holds were measured before methods and strategies owned their options."""
    row = json.loads((ROOT / "benchmarks" / "methods" / "erq_W4A4_seed0.json").read_text())["config"]
    bench = json.loads((ROOT / "benchmarks" / "methods" / "bench.json").read_text())
    found = harness._present(row)
    assert found["method"] == {"name": "erq", **row["erq"]}
    for now, then in (("steps", "gradient_steps"), ("rate", "gradient_rate"), ("matching", "gradient_matching")):
        assert found["search"]["strategy"][now] == row["search"][then]
    assert {name: found[name] for name in ("seed", "recipe", "calibration", "reconstruction")} == {
        name: row[name] for name in ("seed", "recipe", "calibration", "reconstruction")
    }
    assert harness._present(found) == found
    settings = harness._present_settings(bench)
    assert settings["search"] == found["search"] and settings["config"] == to_mapping(QuantizeConfig())
    assert {name: settings[name] for name in settings if name not in ("search", "config")} == {
        name: bench[name] for name in bench if name not in ("search", "config")
    }


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks").rglob("*_seed*.json")), ids=lambda path: path.stem)
def test_every_row_of_the_repository_has_a_configuration_that_is_understood(path: Path) -> None:
    config = json.loads(path.read_text())["config"]
    assert harness._present(config)["method"]["name"] == config["method"]
