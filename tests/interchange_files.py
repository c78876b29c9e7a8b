"""Copies of golden files with something changed."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

Arrays = dict[str, np.ndarray]


def read(path: Path) -> Arrays:
    with np.load(path, allow_pickle=False) as file:
        return dict(file)


def copy_set(source: Path, folder: Path, neighbours: tuple[str, ...] = ("model.npz", "data.npz")) -> Path:
    """A result file and the files beside it, in a folder of their own."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in (*neighbours, source.name):
        shutil.copy(source.parent / name, folder / name)
    return folder / source.name


def rewrite(path: Path, change: Callable[[Arrays], Any]) -> Path:
    """The same file after `change` has worked on its arrays."""
    arrays = read(path)
    change(arrays)
    np.savez(path, **arrays)  # type: ignore[arg-type]
    return path


def change_meta(path: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    """The same file after `change` has worked on its meta."""

    def edit(arrays: Arrays) -> None:
        meta = json.loads(str(arrays["meta"]))
        change(meta)
        arrays["meta"] = np.array(json.dumps(meta))

    return rewrite(path, edit)
