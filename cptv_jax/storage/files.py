"""Files written whole or not at all, digests of arrays, and directories held by one process."""

import errno
import fcntl
import hashlib
import logging
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree

from cptv_jax.errors import InputError

# ---- trees of arrays ------------------------------------------------------------------------------------------------


def write_atomically(path: Path, text: str) -> None:
    """Writes a text file so that a reader sees the old content or the new, whatever happens in between."""
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _digests(directory: Path) -> dict[str, str]:
    """sha256 of every file below a directory, by relative path."""
    digests = {}
    for file in sorted(path for path in directory.rglob("*") if path.is_file()):
        with file.open("rb") as opened:
            digests[file.relative_to(directory).as_posix()] = hashlib.file_digest(opened, "sha256").hexdigest()
    return digests


_LOCK = ".lock"
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP)  # what some network and user-space file systems answer
_PACKAGES = ("cptv-jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")

_logger = logging.getLogger(__name__)


def digest(tree: PyTree) -> str:
    """sha256 over the shapes, dtypes and bytes of a pytree's arrays."""
    hashed = hashlib.sha256()
    for leaf in jax.tree.leaves(tree):
        array = np.ascontiguousarray(leaf)
        hashed.update(f"{array.shape}{array.dtype}".encode())
        hashed.update(array.data)
    return hashed.hexdigest()


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that determine the numbers."""
    packages = {name: version(name) for name in _PACKAGES}
    return {"python": platform.python_version(), **packages}


def refuse_foreign(path: Path, kind: str = "run") -> None:
    """Raises InputError where a run (or, by {kind}.json, another kind of work) cannot live: a file, or a directory
    that holds something else.
    """
    if path.exists() and not path.is_dir():
        raise InputError(f"--out {path} is a file; choose a directory")
    if (
        path.exists()
        and not (path / f"{kind}.json").exists()
        and any(p for p in path.iterdir() if not p.name.startswith("."))
    ):
        raise InputError(f"--out {path} is not empty and not a {kind}; choose another directory")


@contextmanager
def claimed(path: Path, kind: str = "run") -> Iterator[None]:
    """Holds the directory of a run (or of another kind of work), made if need be, for one process at a time.

    The kernel lets go of the lock when the process ends, however it ends; the (hidden, empty) file stays.
    Raises InputError where it cannot live or another process holds the directory.
    """
    refuse_foreign(path, kind)
    path.mkdir(parents=True, exist_ok=True)
    with open(path / _LOCK, "ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(
                f"another process is working in {path}; wait for it or end it, or choose another --out"
            ) from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            _logger.warning("%s is on a file system without locks; start one process only", path)
        yield


def first_difference(a: Any, b: Any, name: str = "") -> str | None:
    """Where two nested mappings of plain data differ first, in words; None where they are equal."""
    if isinstance(a, dict) and isinstance(b, dict):
        for key in [*a, *(key for key in b if key not in a)]:
            different = first_difference(a.get(key), b.get(key), f"{name}.{key}" if name else key)
            if different:
                return different
        return None
    return None if a == b else f"{name.removeprefix('config.')}: {a} there, {b} here"
