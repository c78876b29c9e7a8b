"""A run's directory: what was asked, how far it came, and what came out."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from cptv_jax.errors import InputError
from cptv_jax.quantized.model import QuantizedModel
from cptv_jax.search.events import to_record
from cptv_jax.search.state import SearchState
from cptv_jax.storage.files import first_difference, refuse_foreign, versions, write_atomically
from cptv_jax.storage.models import load_model, save_model
from cptv_jax.storage.trees import restore_tree, save_tree

FORMAT = 2  # of run.json and state/; 1 had no number


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
                whole = json.loads(known.read_text(encoding="utf-8"))
                found, form = whole["identity"], whole.get("format", 1)
            except (ValueError, KeyError, TypeError):
                raise InputError(f"{known} is damaged; choose another --out") from None
            if form != FORMAT:
                raise InputError(
                    f"{path} holds a run of format {form}, but this cptv continues {FORMAT}; choose another --out, or "
                    "continue it with the cptv that began it"
                )
            different = first_difference(found, identity)
            if different:
                raise InputError(
                    f"{path} holds a run with other settings ({different}); "
                    "choose another --out, or repeat the original command to continue it"
                )
            self._refuse_other_versions(known)
        else:
            path.mkdir(parents=True, exist_ok=True)
            write_atomically(
                known, json.dumps({"format": FORMAT, "identity": identity, "versions": versions()}, indent=1)
            )
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
        trees, plain = state.to_saved()  # without empty trees, which Orbax does not save
        save_tree(self.path / "state" / f"{number:06d}", trees, {"kind": "state", "search": plain})
        self._drop(earlier)

    def state(self) -> SearchState | None:
        """The newest saved state, if any."""
        saved = self._numbered("state")
        if not saved:
            return None
        trees, metadata = restore_tree(saved[-1])
        return SearchState.from_saved(trees, metadata["search"])

    def write_log(self, state: SearchState) -> None:
        write_atomically(self.path / "log.jsonl", "".join(json.dumps(to_record(event)) + "\n" for event in state.log))
