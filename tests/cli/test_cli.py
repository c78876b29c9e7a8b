"""The command line where all goes well; tests/test_bad_inputs.py has the rest."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_vit import TINY

from cptv_jax import Model, QuantizeConfig, save_model
from cptv_jax.cli.main import main
from cptv_jax.options import flatten

COMMANDS = ("demo", "import", "quantize", "evaluate", "report", "bench", "compare")


def succeed(*argv: object) -> None:
    with pytest.raises(SystemExit) as ended:
        main([str(word) for word in argv])
    assert ended.value.code == 0


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cli") / "tiny"
    save_model(path, Model(TINY, TINY.initialize(0)))
    return path


@pytest.fixture(scope="module")
def run(tiny: Path) -> Path:
    """A run without a search, and without evaluation."""
    out = tiny.parent / "run"
    options = ("--calibration.images", 16, "--calibration.batch", 8, "--search.strategy", "none")
    succeed("quantize", "--seed", 3, tiny, "--images", "digits:calibration", "--out", out, *options)
    return out


@pytest.mark.parametrize("words", [(), *((name,) for name in COMMANDS)], ids=["cptv", *COMMANDS])
def test_help_helps(words: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    succeed(*words, "--help")
    said = capsys.readouterr()
    assert said.err == ""
    assert said.out.startswith("usage: " + " ".join(["cptv", *words]))
    if not words:
        assert all(name in said.out for name in COMMANDS)
    if words == ("quantize",):
        assert all(f"--{name} " in said.out for name in flatten(QuantizeConfig()))


def test_flags_stand_anywhere_and_reach_the_run(run: Path) -> None:
    config = json.loads((run / "run.json").read_text())["identity"]["config"]
    assert config["seed"] == 3  # given before the model
    assert config["calibration"] == {"images": 16, "batch": 8}
    assert config["search"]["strategy"] == {"name": "none"}


def test_report_prints_the_report(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    succeed("report", run)
    assert capsys.readouterr().out.rstrip("\n") == (run / "report.md").read_text().rstrip("\n")


def test_a_reader_that_stops_early_is_no_error(run: Path) -> None:
    (run / "report.md").write_text("line\n" * 100_000)  # more than a pipe holds
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    command = [sys.executable, "-m", "cptv_jax.cli.main", "report", str(run)]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.readline() == b"line\n"
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait() == 0


def test_evaluate_takes_checkpoints_and_runs(tiny: Path, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for model in (tiny, run, run / "base"):
        succeed("evaluate", model, "--images", "digits:test", "--limit", 30)
        out = capsys.readouterr().out
        assert out.startswith("top-1 ")
        assert out.endswith("% on 30 images\n")


def test_the_same_command_evaluates_a_finished_run(run: Path, tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--calibration.images", 16, "--calibration.batch", 8, "--search.strategy", "none", "--seed", 3)
    succeed("quantize", tiny, "--images", "digits:calibration", "--eval", "digits:test", "--out", run, *options)
    out = capsys.readouterr().out
    results = json.loads((run / "results.json").read_text())
    assert list(results) == ["images", "float", "base", "final"]
    assert f"full precision    top-1 {results['float']['top1']:6.2f} %" in out
    assert str(run / "report.md") in out


def test_import_copies_a_checkpoint(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    succeed("import", tiny, "--out", tmp_path / "deep" / "copy")
    assert "tiny_vit" in capsys.readouterr().out
    succeed("evaluate", tmp_path / "deep" / "copy", "--images", "digits:test", "--limit", 1)


@pytest.mark.slow
def test_one_batch_calibrates_an_integer_softmax_too(tiny: Path, tmp_path: Path) -> None:
    options = ("--calibration.images", 8, "--calibration.batch", 8, "--search.strategy", "none")
    preset = ("--recipe.preset", "fq-vit")
    succeed("quantize", tiny, "--images", "digits:calibration", "--out", tmp_path / "run", *options, *preset)
