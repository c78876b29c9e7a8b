"""Small runs for the tests that stop them: what is run, how it is stopped, and everything that such a run leaves."""

import hashlib
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from PIL import Image
from tiny_vit import TINY

from cptv_jax import CalibrationConfig, Model, QuantizeConfig, RecipeConfig, SearchConfig, load_images
from cptv_jax.models.architecture import Architecture
from cptv_jax.search import Generational
from cptv_jax.storage.trees import METADATA, restore_tree

DEEPER = replace(TINY, config=replace(TINY.config, depth=2))
CONFIG = QuantizeConfig(
    recipe=RecipeConfig(weight_bits=3),
    calibration=CalibrationConfig(images=16, batch=8),  # a batch to calibrate and search, one held out
    search=SearchConfig(strategy=Generational(passes=2, rounds=1, children=4, sigma=0.1)),
)


def tiny_model(architecture: Architecture) -> Model:
    """Random weights, large enough that every image has logits of its own."""
    rng = np.random.default_rng(0)
    weights = jax.tree.map(
        lambda a: np.asarray(a + 0.2 * rng.standard_normal(a.shape), np.float32), architecture.initialize(0)
    )
    return Model(architecture, jax.tree.map(jax.numpy.asarray, weights))


def outcome_of(run: Path) -> dict[str, Any]:
    """Everything that a run leaves: text as bytes, checkpoints as arrays and what describes them."""
    found: dict[str, Any] = {}
    checkpoints = [path.parent for path in sorted(run.rglob(METADATA))]
    for folder in checkpoints:
        tree, metadata = restore_tree(folder)
        del metadata["files"]  # Orbax names them at random
        name = str(folder.relative_to(run))
        found[name] = metadata
        for where, leaf in jax.tree_util.tree_leaves_with_path(tree):
            found[name + jax.tree_util.keystr(where)] = (leaf.dtype, leaf.shape, leaf.tobytes())
    for path in sorted(run.rglob("*")):
        if path.is_file() and not any(folder in path.parents for folder in checkpoints):
            found[str(path.relative_to(run))] = path.read_bytes()
    return found


def assert_same(run: Path, expected: dict[str, Any]) -> None:
    found = outcome_of(run)
    assert sorted(found) == sorted(expected)
    assert [name for name in expected if found[name] != expected[name]] == []


def write_digits(root: Path) -> tuple[Path, Path]:
    """Digits as files, 16 to calibrate and 12 labelled ones: a process reads them without importing scikit-learn."""
    for split, count in (("calibration", 16), ("test", 12)):
        digits = load_images(f"digits:{split}", DEEPER.preprocessing, labels=True, limit=count)
        for i, (values, label) in enumerate(zip(digits.normalize(0, count), digits.require_labels(), strict=True)):
            path = root / split / (str(label) if split == "test" else "") / f"{i:02d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.round((values * 0.5 + 0.5) * 255).astype(np.uint8)).save(path)
    return root / "calibration", root / "test"


class Killed(BaseException):
    """Stands for SIGKILL: nothing in the package may catch it."""


class Saboteur:
    """Ends the process, as it were, at the first writing step at which it has not yet done so.

    What the step was about to write is left half written: a cut-off file, a folder that lacks files.
    """

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch, only: str = "") -> None:
        """only: strikes only at steps with this in their name."""
        self.root, self.only = root, only
        self.done: list[str] = []
        self.armed = True
        self._strike(monkeypatch, os, "replace", self.halve)
        self._strike(monkeypatch, os, "unlink", self.halve)
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

    def go_on_until_done(self, call: Callable[[], Any]) -> None:
        """Calls again after every kill."""
        for _ in range(100):
            self.armed = True
            try:
                call()
                return
            except Killed:
                pass
        raise AssertionError(f"killed again and again: {self.done}")

    def assert_struck(self, *steps: str) -> None:
        """Every one of these steps was a moment of a kill, whatever had been written before."""
        struck = {label.partition(" after ")[0] for label in self.done}
        assert struck.issuperset(steps), (sorted(set(steps) - struck), sorted(struck))

    def moment(self) -> str:
        """Tells apart the times at which one file is written anew."""
        results = self.root / "results.json"
        state = self.root / "state" / "state.json"
        saved = hashlib.sha256(state.read_bytes()).hexdigest()[:8] if state.exists() else "none"
        return f"after {saved}, {results.stat().st_size if results.exists() else 0}"

    @staticmethod
    def halve(path: Path) -> None:
        if path.is_file():
            os.truncate(path, path.stat().st_size // 2)
            return
        for file in sorted(file for file in path.rglob("*") if file.is_file())[::2]:
            file.unlink()
