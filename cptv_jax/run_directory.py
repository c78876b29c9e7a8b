"""A run's directory: what was asked, how far it came, and what came out."""

import errno
import fcntl
import hashlib
import json
import logging
import platform
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np
import yaml
from jaxtyping import PyTree

import cptv_jax
from cptv_jax.checkpoint import load_model, restore_tree, save_model, save_tree, write_atomically
from cptv_jax.errors import InputError
from cptv_jax.quantized import QuantizedModel
from cptv_jax.search.run import SearchState

_LOCK = ".lock"
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP)  # what some network and user-space file systems answer
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")

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
    return {"python": platform.python_version(), "cptv-jax": cptv_jax.__version__, **packages}


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


class RunDirectory:
    """Files of one run.

    config.yaml: the resolved configuration. run.json: identity (configuration, model, images), versions, status.
    One process at a time works in it, under `claimed`.
    base/, model/: checkpoints before and after the search. reconstruction/: while blocks are reconstructed, the model
    so far, named by the stages that are done. state/: where the search stands, one checkpoint a step,
    the newest only. results.json: accuracies. log.jsonl: accepted steps and passes.
    """

    def __init__(self, path: Path, identity: Mapping[str, Any]) -> None:
        """Opens a directory, new or of an interrupted run.

        identity: everything that determines the result. Raises InputError when the directory holds anything else than
        a run with the same identity.
        """
        self.path = path
        refuse_foreign(path)
        known = path / "run.json"
        identity = json.loads(json.dumps(identity))  # as it is read back
        if known.exists():
            try:
                found = json.loads(known.read_text(encoding="utf-8"))["identity"]
            except (ValueError, KeyError, TypeError):
                raise InputError(f"{known} is damaged; choose another --out") from None
            different = first_difference(found, identity)
            if different:
                raise InputError(
                    f"{path} holds a run with other settings ({different}); "
                    "choose another --out, or repeat the original command to continue it"
                )
            self._refuse_other_versions(known)
        else:
            path.mkdir(parents=True, exist_ok=True)
            write_atomically(known, json.dumps({"identity": identity, "versions": versions()}, indent=1))
        write_atomically(path / "config.yaml", yaml.safe_dump(identity["config"], sort_keys=False))
        # What an interruption left:
        self._drop(self._numbered("state")[:-1])
        if (path / "base").exists():
            self.drop_reconstruction()
        else:
            self._drop(self._numbered("reconstruction")[:-1])

    def _refuse_other_versions(self, known: Path) -> None:
        """An unfinished run goes on with what it began with, or its result would be neither version's."""
        begun, here = (
            {name: number for name, number in found.items() if name != "python"}
            for found in (json.loads(known.read_text(encoding="utf-8")).get("versions", {}), versions())
        )
        different = first_difference(begun, here) if begun else None
        if different and not (self.path / "model").exists():
            raise InputError(
                f"{self.path} holds an unfinished run of other versions ({different}); "
                "choose another --out, or continue it with those"
            )

    def base(self) -> QuantizedModel | None:
        """The base method's model, if it was finished."""
        return self._quantized("base")

    def final(self) -> QuantizedModel | None:
        """The final model, if the run got so far."""
        return self._quantized("model")

    def save_reconstruction(self, done: int, model: QuantizedModel) -> None:
        """Keeps the model whose first `done` stages are reconstructed, then drops earlier ones."""
        earlier = self._numbered("reconstruction")
        save_model(self.path / "reconstruction" / f"{done:06d}", model)
        self._drop(earlier)

    def reconstruction(self) -> tuple[int, QuantizedModel] | None:
        """How many stages are reconstructed, and the model so far, if the base method was finished."""
        saved = self._numbered("reconstruction")
        if not saved:
            return None
        model = self._quantized(f"reconstruction/{saved[-1].name}")
        assert model is not None
        return int(saved[-1].name), model

    def drop_reconstruction(self) -> None:
        if (self.path / "reconstruction").exists():
            shutil.rmtree(self.path / "reconstruction")

    def _quantized(self, name: str) -> QuantizedModel | None:
        if not (self.path / name).exists():
            return None
        model = load_model(str(self.path / name))
        if not isinstance(model, QuantizedModel):
            raise InputError(f"{self.path / name} is not a quantized model; the run is damaged, choose another --out")
        return model

    def save_base(self, model: QuantizedModel) -> None:
        save_model(self.path / "base", model)

    def save_final(self, model: QuantizedModel) -> None:
        save_model(self.path / "model", model)

    def results(self) -> dict[str, Any]:
        """Measurements so far, by name."""
        path = self.path / "results.json"
        try:
            return dict(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else {}
        except (ValueError, TypeError):
            raise InputError(f"{path} is damaged; remove it, and the same command measures again") from None

    def save_results(self, results: Mapping[str, Any]) -> None:
        write_atomically(self.path / "results.json", json.dumps(results, indent=1))

    def _numbered(self, folder: str) -> list[Path]:
        return sorted(self.path.glob(f"{folder}/[0-9]*"))

    def _drop(self, paths: list[Path]) -> None:
        for path in paths:
            shutil.rmtree(path)

    def save_state(self, state: SearchState) -> None:
        """Rewrites the log and writes the search's state, then drops older ones.

        The log comes first: ahead of the state it is only written again, behind the last state it would stay so.
        """
        self.write_log(state)
        earlier = self._numbered("state")
        number = int(earlier[-1].name) + 1 if earlier else 0
        trees = ("scales", "best_scales", "direction", "progress")
        described = {name: value for name, value in vars(state).items() if name not in trees}
        tree = {name: getattr(state, name) for name in trees if getattr(state, name)}  # Orbax saves no empty tree
        save_tree(self.path / "state" / f"{number:06d}", tree, {"kind": "state", "search": described})
        self._drop(earlier)

    def state(self) -> SearchState | None:
        """The newest saved state, if any."""
        saved = self._numbered("state")
        if not saved:
            return None
        tree, metadata = restore_tree(saved[-1])
        described = dict(metadata["search"])
        described["log"] = tuple(described["log"])
        return SearchState(**tree, **described)

    def write_log(self, state: SearchState) -> None:
        write_atomically(self.path / "log.jsonl", "".join(json.dumps(record) + "\n" for record in state.log))


def first_difference(a: Any, b: Any, name: str = "") -> str | None:
    """Where two nested mappings of plain data differ first, in words; None where they are equal."""
    if isinstance(a, dict) and isinstance(b, dict):
        for key in [*a, *(key for key in b if key not in a)]:
            different = first_difference(a.get(key), b.get(key), f"{name}.{key}" if name else key)
            if different:
                return different
        return None
    return None if a == b else f"{name.removeprefix('config.')}: {a} there, {b} here"
