"""A bench's runs as processes: each measures its own, says how it ended, and ends with its parent."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tiny_vit import TINY

from cptv_jax import load_images, load_model, quantize
from cptv_jax.bench import methods
from cptv_jax.bench.children import Children
from cptv_jax.bench.methods import Options, bench_methods
from cptv_jax.bench.worker import Phases, Task, peak_mib

ROOT = Path(__file__).parents[2]


@pytest.fixture
def task(options: Options, monkeypatch: pytest.MonkeyPatch) -> Task:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    (config,) = (run.config for run in methods._runs(options, 0))
    options.out.mkdir()
    return Task(
        options.weights,
        None,
        options.images,
        options.evaluation,
        12,
        config,
        options.out / "run",
        options.out / "m.json",
    )


def test_a_task_survives_the_way_to_its_process(task: Task) -> None:
    assert Task.from_json(task.to_json()) == task
    assert "\n" not in task.to_json()


def test_phases_that_were_cut_short_are_marked(tmp_path: Path) -> None:
    first = Phases(tmp_path / "m.json")
    first.begin("base")
    first.begin("search")  # and here it is killed
    second = Phases(tmp_path / "m.json")
    assert set(second.found["base"]) == {"resumed", "seconds", "peak_mib"}
    second.begin("search")
    second.begin("evaluation")
    second.end()
    found = json.loads((tmp_path / "m.json").read_text())["phases"]
    assert [found[name]["resumed"] for name in ("base", "search", "evaluation")] == [False, True, False]
    assert all(phase["seconds"] >= 0 and phase["peak_mib"] > 10 for phase in found.values())


@pytest.mark.slow
def test_a_child_measures_its_own_memory_and_gives_what_this_process_gives(task: Task, tmp_path: Path) -> None:
    hog = bytearray(1500 * 2**20)  # this process's peak is not the child's
    hog[::4096] = b"x" * len(hog[::4096])
    assert Children().run(task, tmp_path / "log") == (0, ""), (tmp_path / "log").read_text()
    measured = json.loads(task.measured.read_text())
    assert 50 < measured["phases"]["base"]["peak_mib"] <= measured["phases"]["search"]["peak_mib"] < peak_mib() - 300
    images = load_images("digits:calibration", TINY.preprocessing, labels=False, limit=16, seed=0)
    test = load_images("digits:test", TINY.preprocessing, labels=True)
    hog.clear()
    outcome = quantize(load_model(task.weights), images, task.config, evaluation=test)  # type: ignore[arg-type]
    assert measured["accuracy"] == {name: vars(found) for name, found in outcome.results.items()}
    same = replace(task, evaluation="digits:calibration")  # of which each seed draws others
    assert Children().run(same, tmp_path / "log")[0] == 2
    assert "are calibration images too" in json.loads(task.measured.read_text())["refused"]
    again = replace(task, images="digits:train")  # a finished run with other images
    assert Children().run(again, tmp_path / "log")[0] == 2
    assert "holds a run with other settings (images" in json.loads(task.measured.read_text())["refused"]


@pytest.mark.parametrize(
    ("script", "code", "says"),
    [("kill -9 $$", -9, "ended by signal 9; see "), ("echo; echo Oh no. >&2; exit 3", 3, "Oh no.; see ")],
)
def test_a_child_that_ends_badly_says_how(
    task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, code: int, says: str
) -> None:
    (tmp_path / "python").write_text(f"#!/bin/sh\n{script}\n")
    (tmp_path / "python").chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    found, reason = Children().run(task, tmp_path / "log")
    assert found == code and reason.startswith(says)


def test_runs_at_once_share_an_accelerator_and_end_with_the_bench(
    options: Options, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    # Every child says what it may take of an accelerator's memory; the bench is interrupted once all have begun.
    said = tmp_path / "said"
    said.mkdir()
    (tmp_path / "python").write_text(
        # Moved there once written: what is listed is whole.
        f"#!/bin/sh\necho $XLA_PYTHON_CLIENT_MEM_FRACTION > {tmp_path}/$$\nmv {tmp_path}/$$ {said}/$$\n"
        f"while [ $(ls {said} | wc -l) -lt 3 ]; do sleep 0.05; done\nexec sleep 600\n"
    )
    (tmp_path / "python").chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))

    def interrupt() -> None:
        deadline = time.monotonic() + 60
        while len(list(said.iterdir())) < 3 and time.monotonic() < deadline:
            time.sleep(0.05)
        # To the main thread, as Ctrl-C goes; raised in this one it would not wake the other until the children end.
        main_thread = threading.main_thread().ident
        assert main_thread is not None
        signal.pthread_kill(main_thread, signal.SIGINT)

    # A shell has what it starts in the background ignore the signal; then nothing would interrupt the bench.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    threading.Thread(target=interrupt, daemon=True).start()
    start = time.monotonic()
    try:
        with pytest.raises(KeyboardInterrupt):
            bench_methods(replace(options, bits=("W8A8", "W4A8", "W3A8"), jobs=3), progress=False)
    finally:
        signal.signal(signal.SIGINT, before)
    assert time.monotonic() - start < 300  # the bench ends its children, which sleep for 600 seconds
    children = [int(path.name) for path in said.iterdir()]
    assert len(children) == 3 and not any(Path(f"/proc/{child}").exists() for child in children)
    assert {path.read_text() for path in said.iterdir()} == {"0.3000\n"}


@pytest.mark.slow
def test_a_child_does_not_outlive_its_parent(task: Task, start: Callable[[], subprocess.Popen[bytes]]) -> None:
    child = start()
    assert child.stdin is not None
    child.stdin.write((task.to_json() + "\n").encode())
    child.stdin.close()  # as the end of the parent does
    assert child.wait(timeout=300) == 1
    assert not task.measured.exists() or not json.loads(task.measured.read_text()).get("done")


@pytest.fixture
def start() -> Any:
    children: list[subprocess.Popen[bytes]] = []

    def begin() -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "cptv_jax.bench.worker"]
        children.append(subprocess.Popen(command, stdin=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(ROOT)}))
        return children[-1]

    yield begin
    for child in children:
        child.kill()
        child.wait()
