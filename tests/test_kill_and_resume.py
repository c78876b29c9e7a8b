"""A run that is stopped anywhere and started again ends with the same bits as one that is never stopped."""

import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from PIL import Image
from tiny_vit import TINY

from cptv_jax import (
    CalibrationConfig,
    InputError,
    Model,
    Quantization,
    QuantizeConfig,
    RecipeConfig,
    SearchConfig,
    load_images,
    pipeline,
    quantize,
    save_model,
    searching,
)
from cptv_jax.checkpoint import METADATA, restore_tree
from cptv_jax.methods import METHODS
from cptv_jax.search import gradient

REPOSITORY = Path(__file__).resolve().parent.parent
KILLS = int(os.environ.get("CPTV_KILLS", "6"))  # 20 before a release: each is a process that starts and compiles
DEEPER = replace(TINY, config=replace(TINY.config, depth=2))
CONFIG = QuantizeConfig(
    recipe=RecipeConfig(weight_bits=3),
    calibration=CalibrationConfig(images=16, batch=8),  # a batch to calibrate and search, one held out
    search=SearchConfig(strategy="generational", passes=2, rounds=1, children=4, sigma=0.1),
)
OPTIONS = [
    *("--recipe.weight_bits=3", "--calibration.images=16", "--calibration.batch=8", "--search.strategy=generational"),
    *("--search.passes=2", "--search.rounds=1", "--search.children=4", "--search.sigma=0.1"),
]


def tiny_model() -> Model:
    """Random weights, large enough that every image has logits of its own."""
    rng = np.random.default_rng(0)
    weights = jax.tree.map(
        lambda a: np.asarray(a + 0.2 * rng.standard_normal(a.shape), np.float32), DEEPER.initialize(0)
    )
    return Model(DEEPER, jax.tree.map(jax.numpy.asarray, weights))


def outcome_of(run: Path) -> dict[str, Any]:
    """Everything that a run leaves: text as bytes, checkpoints as arrays and what describes them."""
    found: dict[str, Any] = {}
    checkpoints = [path.parent for path in sorted(run.rglob(METADATA))]
    for folder in checkpoints:
        tree, metadata = restore_tree(folder)
        del metadata["files"]  # Orbax names them at random
        name = str(folder.relative_to(run))
        found[name] = metadata
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            found[name + jax.tree_util.keystr(path)] = (leaf.dtype, leaf.shape, leaf.tobytes())
    for path in sorted(run.rglob("*")):
        if path.is_file() and not any(folder in path.parents for folder in checkpoints):
            found[str(path.relative_to(run))] = path.read_bytes()
    return found


def assert_same(run: Path, expected: dict[str, Any]) -> None:
    found = outcome_of(run)
    assert sorted(found) == sorted(expected)
    assert [name for name in expected if found[name] != expected[name]] == []


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Digits as files, 16 to calibrate and 12 labelled ones: a process reads them without importing scikit-learn."""
    root = tmp_path_factory.mktemp("digits")
    for split, count in (("calibration", 16), ("test", 12)):
        digits = load_images(f"digits:{split}", DEEPER.preprocessing, labels=True, limit=count)
        for i, (values, label) in enumerate(zip(digits.normalized(0, count), digits.require_labels(), strict=True)):
            path = root / split / (str(label) if split == "test" else "") / f"{i:02d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.round((values * 0.5 + 0.5) * 255).astype(np.uint8)).save(path)
    return root / "calibration", root / "test"


# Every step that writes, in turn


class Killed(BaseException):
    """Stands for SIGKILL: nothing in the package may catch it."""


class Saboteur:
    """Ends the process, as it were, at the first writing step at which it has not yet done so.

    What the step was about to write is left half written: a cut-off file, a folder that lacks files.
    """

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch, only: str = "") -> None:
        """only: strikes only at steps with this in their name."""
        self.root, self.done, self.only = root, [], only
        self.armed = True
        self._strike(monkeypatch, os, "replace", self.halve)
        self._strike(monkeypatch, shutil, "rmtree", self.halve)
        self._strike(monkeypatch, ocp.PyTreeCheckpointer, "save", None)

    def _strike(self, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, before: Callable | None) -> None:
        original = getattr(owner, name)

        def step(*args: Any, **kwargs: Any) -> Any:
            paths = [Path(arg) for arg in args if isinstance(arg, str | Path)]
            ours = self.armed and paths and self.root in paths[0].parents and paths[0].exists() is (before is not None)
            label = f"{name} {paths[-1].relative_to(self.root)} {self.moment()}" if ours else ""
            # A step within one that is watched (Orbax's own) is a part of it.
            if not ours or self.only not in label or label in self.done or "arrays" in paths[-1].parts[:-1]:
                return original(*args, **kwargs)
            self.done.append(label)
            self.armed = False
            if before is None:
                original(*args, **kwargs)
                self.halve(paths[0])
            else:
                before(paths[0])
            raise Killed(label)

        monkeypatch.setattr(owner, name, step)

    def moment(self) -> str:
        """Tells apart the times at which one file is written anew."""
        results = self.root / "results.json"
        states = sorted(path.name for path in self.root.glob("state/[0-9]*"))
        return f"after {states[-1:]}, {results.stat().st_size if results.exists() else 0}"

    @staticmethod
    def halve(path: Path) -> None:
        if path.is_file():
            os.truncate(path, path.stat().st_size // 2)
            return
        for file in sorted(file for file in path.rglob("*") if file.is_file())[::2]:
            file.unlink()


@pytest.fixture(scope="module")
def model() -> Model:
    return tiny_model()


@pytest.fixture
def call(model: Model, folders: tuple[Path, Path]) -> Callable[[Path], Quantization]:
    calibration, test = (
        load_images(str(folder), DEEPER.preprocessing, labels=labels, progress=False)
        for folder, labels in zip(folders, (False, True), strict=True)
    )
    return lambda out: quantize(model, calibration, CONFIG, out=out, evaluation=test)


@pytest.mark.slow
def test_a_kill_in_any_writing_step_leaves_a_run_that_goes_on(
    call: Callable[[Path], Quantization], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outcome = call(tmp_path / "whole")
    expected = outcome_of(tmp_path / "whole")
    assert any(record["event"] == "accepted" for record in outcome.log)  # else scales would be equal anyhow
    saboteur = Saboteur(tmp_path / "killed", monkeypatch)
    kills = 0
    while True:
        saboteur.armed = True
        try:
            call(tmp_path / "killed")
            break
        except Killed:
            kills += 1
            assert kills < 100, saboteur.done
    steps = {label.partition(" after ")[0] for label in saboteur.done}
    assert sum(label.startswith("replace log.jsonl") for label in saboteur.done) == 5
    assert sum(label.startswith("replace results.json") for label in saboteur.done) == 3
    for step in (
        "replace run.json",
        "replace config.yaml",
        "save .base.tmp/arrays",
        "replace base",
        "save state/.000000.tmp/arrays",
        "replace state/000000",
        "rmtree state/000003",
        "replace log.jsonl",
        "replace state/000004",
        "save .model.tmp/arrays",
        "replace model",
        "replace results.json",
        "replace loss.png",
        "replace report.md",
    ):
        assert step in steps, sorted(steps)
    assert_same(tmp_path / "killed", expected)


@pytest.mark.slow
def test_a_guided_run_goes_on_from_within_a_proposal(
    model: Model, folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gradient, "_SAVED_EVERY", 2)
    searching = SearchConfig(strategy="guided", gradient_steps=5, gradient_batch=4, sites=("*",))
    images = load_images(str(folders[0]), DEEPER.preprocessing, labels=False, progress=False)

    def call(out: Path) -> Quantization:
        return quantize(model, images, replace(CONFIG, search=searching), out=out)

    outcome = call(tmp_path / "whole")
    taken = [record["fraction"] for record in outcome.log if record["event"] == "proposal"]
    assert any(taken) and len(taken) == 2  # the opening and the proposal
    saboteur = Saboteur(tmp_path / "killed", monkeypatch, only="save state/")
    for _ in range(100):
        saboteur.armed = True
        try:
            call(tmp_path / "killed")
            break
        except Killed:
            pass
    assert len(saboteur.done) == 1 + 2 + 1 + 4  # the start, two states within the proposal, its end and the stages
    assert_same(tmp_path / "killed", outcome_of(tmp_path / "whole"))


def test_an_unfinished_run_is_not_continued_with_other_versions(
    call: Callable[[Path], Quantization], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    call(tmp_path / "run")
    known = tmp_path / "run" / "run.json"
    begun = json.loads(known.read_text())
    known.write_text(json.dumps({**begun, "versions": {**begun["versions"], "jax": "0.1.2", "python": "3.1"}}))
    call(tmp_path / "run")  # what is finished stays so
    shutil.rmtree(tmp_path / "run" / "model")
    with pytest.raises(InputError, match=r"unfinished run of other versions \(jax: 0\.1\.2 there, .* here\)"):
        call(tmp_path / "run")
    known.write_text(json.dumps(begun))
    call(tmp_path / "run")


def test_a_finished_run_is_not_computed_again(call: Callable[[Path], Quantization], tmp_path: Path) -> None:
    first = call(tmp_path / "run")
    expected = outcome_of(tmp_path / "run")

    def fail(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("computed again")

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(METHODS, "fq-vit", replace(METHODS["fq-vit"], carry_out=fail))
        patch.setattr(searching, "run_search", fail)
        patch.setattr(pipeline, "evaluate", fail)
        second = call(tmp_path / "run")
    assert_same(tmp_path / "run", expected)
    assert second.results == first.results
    assert second.log == first.log


# Processes


# Tests that run in the background of a script ignore SIGINT, which their children inherit: here it acts again.
CLI = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)
from cptv_jax.cli import main
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


def watch(process: subprocess.Popen[str], out: Path, changes: float) -> int:
    """Returns when the process has changed its run directory so many times, or has ended; the changes seen.

    Counted in changes, not in seconds: how long a step takes depends on what else the machine does.
    """

    def look() -> list[tuple[str, int]]:
        paths = [*out.glob("*"), *out.glob(".*"), *out.glob("state/*"), *out.glob("state/.*")]
        return [(path.name, path.lstat().st_mtime_ns) for path in sorted(paths) if path.exists()]

    seen, before = 0, look()
    while process.poll() is None and seen < changes:
        time.sleep(0.005)
        try:
            now = look()
        except FileNotFoundError:  # gone since it was listed
            continue
        seen, before = seen + (now != before), now
    return seen


def how_far(out: Path) -> str:
    for name, phase in (
        ("report.md", "done"),
        ("results.json", "evaluation"),
        ("model", "model saved"),
        (".model.tmp", "saving the model"),
        ("state", "search"),
        ("base", "search begins"),
        (".base.tmp", "saving the base"),
    ):
        if (out / name).exists():
            return phase
    return "calibration"


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
            # From opening the directory on; early ones are likelier, as a run that goes on has less before it.
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
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, model: Model
) -> None:
    from cptv_jax.cli import main

    def interrupted(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    save_model(tmp_path / "tiny", model)
    monkeypatch.setattr(searching, "run_search", interrupted)
    with pytest.raises(SystemExit) as ended:
        main(["quantize", str(tmp_path / "tiny"), "--images", "digits:calibration", *OPTIONS, "--out", f"{tmp_path}/o"])
    assert ended.value.code == 130
    assert capsys.readouterr().err.split("\n")[-2] == "cptv: interrupted; the same command continues the run"
    monkeypatch.undo()
    with pytest.raises(SystemExit) as ended:
        main(["quantize", str(tmp_path / "tiny"), "--images", "digits:calibration", *OPTIONS, "--out", f"{tmp_path}/o"])
    assert ended.value.code == 0
