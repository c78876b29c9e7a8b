"""Files written whole or not at all, digests of arrays, and directories held by one process."""

import errno
import hashlib
import logging
import os
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, BinaryIO

import filelock
import jax
import numpy as np
from jaxtyping import PyTree

from cptv_jax import __version__
from cptv_jax.errors import InputError

_LOCK = ".lock"
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP)  # errors of some network and user-space file systems
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")

_logger = logging.getLogger(__name__)


def write_atomically(path: Path, text: str) -> None:
    """Writes a text file so that a reader sees either the old content or the new, whatever happens in between.

    Args:
        path: The file to write or to replace; its folder exists.
        text: The content, written as UTF-8. Bytes of a file name that are not UTF-8 appear as escapes.
    """
    content = text.encode("utf-8", "backslashreplace")
    replace_atomically(path, lambda file: file.write(content))


def replace_atomically(path: Path, write: Callable[[BinaryIO], Any]) -> None:
    """Lets a function write a file that appears under its name only when it is whole; an error leaves nothing behind.

    Args:
        path: The file to write or to replace; its folder exists.
        write: Writes the content to an open binary file.

    Raises:
        OSError: The file cannot be written.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def digest_files(directory: Path) -> dict[str, str]:
    """Returns the sha256 of every file below a directory, by relative path.

    Args:
        directory: The directory.
    """
    digests = {}
    for file in sorted(path for path in directory.rglob("*") if path.is_file()):
        with file.open("rb") as opened:
            digests[file.relative_to(directory).as_posix()] = hashlib.file_digest(opened, "sha256").hexdigest()
    return digests


def digest(tree: PyTree) -> str:
    """Returns the sha256 over the shapes, dtypes and bytes of a pytree's arrays.

    Args:
        tree: The pytree.
    """
    hashed = hashlib.sha256()
    for leaf in jax.tree.leaves(tree):
        array = np.asarray(leaf, order="C")
        hashed.update(f"{array.shape}{array.dtype}".encode())
        hashed.update(array.data)
    return hashed.hexdigest()


def versions() -> dict[str, str]:
    """Returns the versions of Python and of the packages that determine the numbers."""
    packages = {name: version(name) for name in _PACKAGES}
    return {"python": platform.python_version(), "cptv-jax": __version__, **packages}


def refuse_foreign(path: Path, kind: str = "run") -> None:
    """Refuses a path where no run can live: a file, or a directory that holds something else.

    Args:
        path: The directory that --out names; it need not exist.
        kind: What is to live there, as in the name of its file {kind}.json.

    Raises:
        InputError: The path cannot be used.
    """
    refuse_undecodable(path)
    if path.exists() and not path.is_dir():
        raise InputError(f"--out {path} is a file; choose a directory")
    if (
        path.exists()
        and not (path / f"{kind}.json").exists()
        and any(p for p in path.iterdir() if not p.name.startswith("."))
    ):
        raise InputError(f"--out {path} is not empty and not a {kind}; choose another directory")


def refuse_undecodable(path: Path) -> None:
    """Refuses a checkpoint's path that is not UTF-8: Orbax can neither write nor read there.

    Args:
        path: The path.

    Raises:
        InputError: The path is not UTF-8.
    """
    try:
        os.fspath(path.absolute()).encode("utf-8")
    except UnicodeEncodeError:
        shown = os.fspath(path.absolute()).encode("utf-8", "backslashreplace").decode("utf-8")
        raise InputError(f"the name of {shown} is not valid UTF-8; rename it or choose another folder") from None


@contextmanager
def lock(path: Path, kind: str = "run") -> Iterator[None]:
    """Holds the directory of a run (or of another kind of work) for one process at a time, and makes it if need be.

    The system releases the lock when the process ends, however it ends; the (hidden, empty) file stays. On a file
    system without locks there is only a warning.

    Args:
        path: The directory.
        kind: See `refuse_foreign`.

    Yields:
        Nothing, while the lock is held.

    Raises:
        InputError: The directory cannot be used, or another process holds it.
        OSError: The directory cannot be made or locked.
    """
    refuse_foreign(path, kind)
    path.mkdir(parents=True, exist_ok=True)
    with open(path / _LOCK, "ab") as file:
        try:
            held = filelock.lock_descriptor(file.fileno(), blocking=False)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            _logger.warning("%s is on a file system without locks; start one process only", path)
            held = True
        if not held:
            raise InputError(f"another process is working in {path}; wait for it or end it, or choose another --out")
        yield


def first_difference(a: Any, b: Any, name: str = "") -> str | None:
    """Describes the first difference of two nested mappings of plain data.

    Args:
        a: The mapping, or a value in it, that was there before.
        b: The mapping, or a value in it, that is given here.
        name: The value's path in the mappings.

    Returns:
        The path and both values in words; None where the two are equal.
    """
    if isinstance(a, dict) and isinstance(b, dict):
        for key in [*a, *(key for key in b if key not in a)]:
            different = first_difference(a.get(key), b.get(key), f"{name}.{key}" if name else key)
            if different:
                return different
        return None
    return None if a == b else f"{name.removeprefix('config.')}: {a} there, {b} here"
