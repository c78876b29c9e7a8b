"""The state of a search, saved so that a part that did not change is not written again.

A folder holds `state.json`, which names every part by the digest of its arrays, and a file `DIGEST.npz` for each
distinct part. Files appear whole, state.json last; files that it does not name are leftovers and are removed.
"""

import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import PyTree

from cptv_jax.errors import InputError
from cptv_jax.storage.files import digest, replace_atomically, write_atomically

Parts = Mapping[str, Mapping[str, PyTree]]  # nested dictionaries of arrays, by tree and part

_INDEX = "state.json"
_KINDS = "biufc"  # kinds of dtypes that .npz files keep without pickle: booleans and numbers


def save_search_state(folder: Path, parts: Parts, described: Mapping[str, Any]) -> None:
    """Replaces the saved state; a process that ends at any moment leaves either the previous state or this one.

    Args:
        folder: The state's own folder, made if need be.
        parts: Arrays in nested dictionaries with string keys, by the name of a tree and of a part of it. Each part is a
            file, written only if no part of the previous state has the same arrays.
        described: The rest of the state, as plain data for JSON.

    Raises:
        TypeError: A key is not a string, or an array does not hold numbers.
    """
    folder.mkdir(exist_ok=True)
    index: dict[str, Any] = {"parts": {}, "described": dict(described)}
    for tree, of_tree in parts.items():
        entries = index["parts"].setdefault(tree, {})
        for name, part in of_tree.items():
            arrays: list[np.ndarray] = []
            structure = _number_leaves(part, arrays)
            found = digest(arrays)
            entries[name] = {"digest": found, "structure": structure}
            file = folder / f"{found}.npz"
            if not file.exists():
                numbered = {str(i): array for i, array in enumerate(arrays)}
                replace_atomically(file, lambda opened, numbered=numbered: np.savez(opened, **numbered))  # type: ignore[misc]
    write_atomically(folder / _INDEX, json.dumps(index))
    remove_leftovers(folder)


def load_search_state(folder: Path) -> tuple[dict[str, dict[str, PyTree]], dict[str, Any]] | None:
    """Reads the saved state.

    Args:
        folder: The state's own folder.

    Returns:
        The arrays (NumPy) and the rest, as `save_search_state` took them; None where none is saved.

    Raises:
        InputError: A file is damaged or missing.
    """
    index = _read_index(folder)
    if index is None:
        return None
    read: dict[str, list[np.ndarray]] = {}
    trees: dict[str, dict[str, PyTree]] = {}
    for tree, entries in index["parts"].items():
        trees[tree] = {}
        for name, entry in entries.items():
            if entry["digest"] not in read:
                read[entry["digest"]] = _read_part(folder, entry["digest"])
            trees[tree][name] = _restore_leaves(entry["structure"], read[entry["digest"]])
    return trees, index["described"]


def remove_leftovers(folder: Path) -> None:
    """Removes the files of a state's folder that the saved state does not name.

    Args:
        folder: The state's own folder; it need not exist.
    """
    if not folder.exists():
        return
    index = _read_index(folder)
    entries = [entry for of_tree in index["parts"].values() for entry in of_tree.values()] if index else []
    named = {_INDEX, *(f"{entry['digest']}.npz" for entry in entries)}
    for path in folder.iterdir():
        if path.name not in named:
            path.unlink()


def _number_leaves(tree: PyTree, arrays: list[np.ndarray]) -> Any:
    """Appends the arrays of nested dictionaries to a list.

    Returns:
        The same dictionaries with the arrays' places in the list.

    Raises:
        TypeError: A key is not a string, or an array does not hold numbers.
    """
    if isinstance(tree, Mapping):
        if not all(isinstance(key, str) for key in tree):
            raise TypeError(f"keys of saved dictionaries are strings, but these are {list(tree)}")
        return {key: _number_leaves(value, arrays) for key, value in tree.items()}
    array = np.asarray(tree)
    if array.dtype.kind not in _KINDS:
        raise TypeError(f"saved states hold numbers, not {type(tree).__name__} of {array.dtype}")
    arrays.append(array)
    return len(arrays) - 1


def _restore_leaves(structure: Any, arrays: list[np.ndarray]) -> PyTree:
    """Returns nested dictionaries with the arrays at their places; inverse of `_number_leaves`."""
    if isinstance(structure, dict):
        return {key: _restore_leaves(value, arrays) for key, value in structure.items()}
    return arrays[structure]


def _read_index(folder: Path) -> dict[str, Any] | None:
    path = folder / _INDEX
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(index["parts"], dict) and isinstance(index["described"], dict):
            return index
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError):
        pass
    raise _damage_error(path, "damaged", folder)


def _read_part(folder: Path, wanted: str) -> list[np.ndarray]:
    path = folder / f"{wanted}.npz"
    try:
        with np.load(path, allow_pickle=False) as opened:
            arrays = [opened[str(i)] for i in range(len(opened.files))]
    except FileNotFoundError:
        raise _damage_error(path, "missing", folder) from None
    except (ValueError, KeyError, OSError, EOFError, zipfile.BadZipFile):
        raise _damage_error(path, "damaged", folder) from None
    if digest(arrays) != wanted:
        raise _damage_error(path, "damaged", folder)
    return arrays


def _damage_error(path: Path, state: str, folder: Path) -> InputError:
    """Returns the error for a file that is damaged or missing."""
    return InputError(f"{path} is {state}; remove {folder}, and the same command begins the search again")
