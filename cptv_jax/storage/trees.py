"""Nested dictionaries of arrays as Orbax checkpoints with JSON metadata."""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree

from cptv_jax.errors import InputError
from cptv_jax.storage.files import digest_files, refuse_undecodable, write_atomically
from cptv_jax.storage.interrupts import defer_interrupts

FORMAT = "cptv-jax checkpoint"
VERSION = 1
METADATA = "metadata.json"
_ARRAYS = "arrays"
_MB = 1e6


def save_tree(path: Path, tree: PyTree, metadata: Mapping[str, Any]) -> None:
    """Writes nested dictionaries of arrays and their metadata as a new directory; it appears whole or not at all.

    Args:
        path: The directory to make, with its parents.
        tree: Nested dictionaries of arrays.
        metadata: Plain data, which `restore_tree` returns with the arrays.

    Raises:
        InputError: `path` exists, is not UTF-8, or is on a disk without enough room.
    """
    import orbax.checkpoint as ocp  # here, not above: it takes a third of a second to import

    if path.exists():
        raise InputError(f"{path} exists already; choose another name or remove it first")
    refuse_undecodable(path)
    arrays = jax.tree.map(np.asarray, tree)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    _refuse_full_disk(path, sum(array.nbytes for array in jax.tree.leaves(arrays)))
    try:
        # An interrupt that unwound Orbax halfway would leave threads behind that print tracebacks as the process ends.
        with defer_interrupts(), ocp.PyTreeCheckpointer() as checkpointer:
            checkpointer.save((temporary / _ARRAYS).absolute(), arrays)
        description = {
            "format": FORMAT,
            "version": VERSION,
            **metadata,
            "tree": jax.tree.map(lambda _: "array", arrays),
            "files": digest_files(temporary / _ARRAYS),
        }
        write_atomically(temporary / METADATA, json.dumps(description, indent=1))
        os.replace(temporary, path)
    except Exception:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _refuse_full_disk(path: Path, needed: int) -> None:
    """Refuses a disk that lacks `needed` bytes: Orbax would print tracebacks from its threads.

    Raises:
        InputError: The disk has too little room.
    """
    free = shutil.disk_usage(path.parent).free
    if free < needed:
        raise InputError(
            f"{path} needs {needed / _MB:.1f} MB, but {free / _MB:.1f} MB are left on its disk; "
            "make room or choose another place"
        )


def read_metadata(path: Path) -> dict[str, Any]:
    """Reads the metadata of a checkpoint directory.

    Args:
        path: The directory.

    Returns:
        The metadata.

    Raises:
        InputError: The directory is not a checkpoint, is damaged, or is of a newer format.
    """
    try:
        metadata = json.loads((path / METADATA).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(
            f"{path} is not a cptv checkpoint, as it has no {METADATA}; give a checkpoint, a run or a file of weights"
        ) from None
    except (ValueError, OSError) as error:
        raise InputError(f"{path / METADATA} is damaged ({error}); import or quantize again") from None
    if not isinstance(metadata, dict) or metadata.get("format") != FORMAT:
        raise InputError(f"{path / METADATA} does not describe a cptv checkpoint; import or quantize again")
    if metadata.get("version") != VERSION:
        raise InputError(
            f"{path} has checkpoint version {metadata.get('version')}, but this cptv reads {VERSION}; "
            "use the cptv that wrote it"
        )
    return metadata


def restore_tree(path: Path) -> tuple[PyTree, dict[str, Any]]:
    """Reads a checkpoint directory.

    Args:
        path: The directory.

    Returns:
        Its nested dictionaries of arrays (NumPy), and its metadata.

    Raises:
        InputError: The directory is not a checkpoint, is of a newer format, or is damaged.
    """
    import orbax.checkpoint as ocp  # as in save_tree

    refuse_undecodable(path)
    metadata = read_metadata(path)
    # Checked before Orbax reads them, because for a damaged file it also prints tracebacks from its threads.
    expected, found = metadata.get("files"), digest_files(path / _ARRAYS)
    if not isinstance(expected, dict) or not isinstance(metadata.get("tree"), dict):
        raise InputError(f"{path / METADATA} does not describe its arrays; import or quantize again")
    for name, digest in expected.items():
        if found.get(name) != digest:
            state = "damaged" if name in found else "missing"
            raise InputError(f"{path / _ARRAYS / name} is {state}; import or quantize again")
    as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), metadata["tree"])
    try:
        with defer_interrupts(), ocp.PyTreeCheckpointer() as checkpointer:  # as in save_tree
            tree = checkpointer.restore((path / _ARRAYS).absolute(), restore_args=as_numpy)
    except Exception as error:  # Orbax raises many types for missing and damaged files
        reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        raise InputError(f"{path} is damaged and cannot be restored ({reason}); import or quantize again") from None
    return tree, metadata
