"""A process that is killed or interrupted at any moment, and begun again, ends with the same bits as ever."""

import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from stopped_runs import assert_same, outcome_of

from cptv_jax import Model, save_model
from cptv_jax.pipeline import search_phase

REPOSITORY = Path(__file__).resolve().parents[2]
KILLS = int(os.environ.get("CPTV_KILLS", "6"))  # 20 before a release: each is a process that starts and compiles
PHASES = {  # how far a run is that has this file, in order
    "report.md": "done",
    "results.json": "evaluation",
    "model": "model saved",
    ".model.tmp": "saving the model",
    "state": "search",
    "base": "search begins",
    ".base.tmp": "saving the base",
}
OPTIONS = [
    *("--recipe.weight_bits=3", "--calibration.images=16", "--calibration.batch=8", "--search.strategy=generational"),
    *(
        "--search.strategy.passes=2",
        "--search.strategy.rounds=1",
        "--search.strategy.children=4",
        "--search.strategy.sigma=0.1",
    ),
]
# Tests that run in the background of a script ignore SIGINT, which their children inherit: here it acts again.
CLI = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)
from cptv_jax.cli.main import main
main()
"""


def begin(model: Path, folders: tuple[Path, Path], out: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", CLI, "quantize", str(model), *OPTIONS, "--out", str(out)]
    command += ["--images", str(folders[0]), "--eval", str(folders[1])]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    return subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        cwd=model.parent,
    )


def look(out: Path) -> list[tuple[str, int]]:
    paths = [*out.glob("*"), *out.glob(".*"), *out.glob("state/*"), *out.glob("state/.*")]
    return [(path.name, path.lstat().st_mtime_ns) for path in sorted(paths) if path.exists()]


def watch(process: subprocess.Popen[str], out: Path, changes: float, file: str = "") -> int:
    """Returns when the process has changed its run directory so many times, or has ended; the changes seen.

    Counted in changes, not in seconds, as how long a step takes depends on what else the machine does; from when `file`
    is there.
    """
    seen, before = 0, look(out)
    while process.poll() is None and seen < changes:
        time.sleep(0.005)
        try:
            now = look(out)
        except FileNotFoundError:  # gone since it was listed
            continue
        if (out / file).exists():
            seen += now != before
        before = now
    return seen


def how_far(out: Path) -> str:
    return next((phase for file, phase in PHASES.items() if (out / file).exists()), "calibration")


@pytest.fixture
def checkpoint(model: Model, tmp_path: Path) -> Path:
    save_model(tmp_path / "tiny", model)
    return tmp_path / "tiny"


@pytest.fixture
def processes() -> Iterator[list[subprocess.Popen[str]]]:
    begun: list[subprocess.Popen[str]] = []
    yield begun
    for process in begun:
        process.kill()
        process.wait()


@pytest.mark.slow
def test_kills_at_random_moments_change_no_bit(
    checkpoint: Path, folders: tuple[Path, Path], tmp_path: Path, processes: list[subprocess.Popen[str]]
) -> None:
    whole = begin(checkpoint, folders, tmp_path / "whole")
    processes.append(whole)
    total = watch(whole, tmp_path / "whole", math.inf)
    assert whole.wait() == 0
    expected = outcome_of(tmp_path / "whole")

    rng = random.Random(20)
    phases: list[str] = []
    finished = 0
    while len(phases) < KILLS or not finished:
        out = tmp_path / f"killed{finished}"
        process = begin(checkpoint, folders, out)
        processes.append(process)
        if len(phases) < KILLS:
            if len(phases) < 3:  # one in each of the longest phases, whatever the rest's chance
                watch(process, out, 1, ("", "state", "model")[len(phases)])
            else:  # from opening the directory on; early ones are likelier, as a run that goes on has less before it
                watch(process, out, 1 + rng.randrange(total) * rng.random())
                time.sleep(rng.choice([0, 0.1, 0.5]) * rng.random())
            process.send_signal(signal.SIGKILL)
        assert process.wait() in (0, -signal.SIGKILL), process.stderr.read() if process.stderr else ""
        if process.returncode == 0:
            assert_same(out, expected)
            finished += 1
        else:
            phases.append(how_far(out))
    print(f"killed in: {', '.join(phases)}; {finished} runs finished")
    last = tmp_path / f"killed{finished}"
    if last.exists():
        process = begin(checkpoint, folders, last)
        processes.append(process)
        assert process.wait() == 0
        assert_same(last, expected)
    assert len(set(phases)) >= 3


@pytest.mark.slow
def test_ctrl_c_says_how_to_go_on_and_the_run_goes_on(
    checkpoint: Path, folders: tuple[Path, Path], processes: list[subprocess.Popen[str]]
) -> None:
    out = checkpoint.parent / "run"
    process = begin(checkpoint, folders, out)
    processes.append(process)
    while process.poll() is None and not (out / "state").exists():
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate()
    assert process.returncode == 130
    assert "Traceback" not in stderr
    assert stderr.split("\n")[-2] == "cptv: interrupted; the same command continues the run"
    assert not (out / "model").exists()
    again = begin(checkpoint, folders, out)
    processes.append(again)
    assert again.wait() == 0
    assert json.loads((out / "results.json").read_text())["final"]["images"] == 12


def test_an_interrupt_exits_with_130_and_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, small_model: Model
) -> None:
    from cptv_jax.cli.main import main

    def interrupted(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    save_model(tmp_path / "tiny", small_model)
    monkeypatch.setattr(search_phase, "run_search", interrupted)
    with pytest.raises(SystemExit) as ended:
        main(["quantize", str(tmp_path / "tiny"), "--images", "digits:calibration", *OPTIONS, "--out", f"{tmp_path}/o"])
    assert ended.value.code == 130
    assert capsys.readouterr().err.split("\n")[-2] == "cptv: interrupted; the same command continues the run"
    monkeypatch.undo()
    with pytest.raises(SystemExit) as ended:
        main(["quantize", str(tmp_path / "tiny"), "--images", "digits:calibration", *OPTIONS, "--out", f"{tmp_path}/o"])
    assert ended.value.code == 0
