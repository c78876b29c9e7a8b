"""A run's directory: what was asked, how far it came, and what came out."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from cptv_jax.errors import InputError
from cptv_jax.quantized.model import QuantizedModel
from cptv_jax.quantizers import free_from_plain, free_to_plain
from cptv_jax.search.events import to_record
from cptv_jax.search.state import SearchState
from cptv_jax.storage.files import first_difference, refuse_foreign, versions, write_atomically
from cptv_jax.storage.models import load_model, save_model
from cptv_jax.storage.run_file import RUN_FILE, RUN_FORMAT, read_run_file
from cptv_jax.storage.search_states import load_search_state, remove_leftovers, save_search_state

_TREES = ("scales", "best_scales", "direction", "progress")  # of a search's state: what holds arrays


class RunDirectory:
    """The files of one run.

    config.yaml: the resolved configuration. run.json: the format of the directory, the run's identity (configuration,
    model, images) and versions. base/, model/: checkpoints before and after the search. reconstruction/: while blocks
    are reconstructed, the model so far, named by the number of stages that are done. state/: where the search stands.
    results.json: accuracies. log.jsonl: accepted steps and passes.

    One process at a time works in a run, under `files.lock`.
    """

    def __init__(self, path: Path, identity: Mapping[str, Any]) -> None:
        """Opens a directory, a new one or that of an interrupted run.

        Args:
            path: the directory, made if need be.
            identity: everything that determines the result, as plain data; "config" is the configuration.

        Raises:
            InputError: the directory holds anything else than a run of this format with the same identity.
        """
        self.path = path
        refuse_foreign(path)
        known = path / RUN_FILE
        identity = json.loads(json.dumps(identity))  # as it is read back
        if known.exists():
            begun = read_run_file(known)
            different = first_difference(begun["identity"], identity)
            if different:
                raise InputError(
                    f"{path} holds a run with other settings ({different}); "
                    "choose another --out, or repeat the original command to continue it"
                )
            self._refuse_other_versions(begun)
        else:
            path.mkdir(parents=True, exist_ok=True)
            description = {"format": RUN_FORMAT, "identity": identity, "versions": versions()}
            write_atomically(known, json.dumps(description, indent=1))
        write_atomically(path / "config.yaml", yaml.safe_dump(identity["config"], sort_keys=False))
        # What an interruption left:
        remove_leftovers(path / "state")
        if (path / "base").exists():
            self.drop_reconstruction()
        else:
            self._drop(self._list_numbered("reconstruction")[:-1])

    def _refuse_other_versions(self, begun: Mapping[str, Any]) -> None:
        """An unfinished run goes on with the versions that it began with, or its result would be neither's."""
        there, here = (
            {name: number for name, number in found.items() if name != "python"}
            for found in (begun.get("versions", {}), versions())
        )
        different = first_difference(there, here) if there else None
        if different and not (self.path / "model").exists():
            raise InputError(
                f"{self.path} holds an unfinished run of other versions ({different}); "
                "choose another --out, or continue it with those"
            )

    def base(self) -> QuantizedModel | None:
        """The base method's model, if it was finished."""
        return self._load_quantized("base")

    def final(self) -> QuantizedModel | None:
        """The final model, if the run got so far."""
        return self._load_quantized("model")

    def save_reconstruction(self, done: int, model: QuantizedModel) -> None:
        """Keeps the model whose first `done` stages are reconstructed, then drops earlier ones."""
        earlier = self._list_numbered("reconstruction")
        save_model(self.path / "reconstruction" / f"{done:06d}", model)
        self._drop(earlier)

    def reconstruction(self) -> tuple[int, QuantizedModel] | None:
        """How many stages are reconstructed, and the model so far, if the base method was finished."""
        saved = self._list_numbered("reconstruction")
        if not saved:
            return None
        model = self._load_quantized(f"reconstruction/{saved[-1].name}")
        assert model is not None
        return int(saved[-1].name), model

    def drop_reconstruction(self) -> None:
        if (self.path / "reconstruction").exists():
            shutil.rmtree(self.path / "reconstruction")

    def _load_quantized(self, name: str) -> QuantizedModel | None:
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

    def _list_numbered(self, folder: str) -> list[Path]:
        return sorted(self.path.glob(f"{folder}/[0-9]*"))

    def _drop(self, paths: list[Path]) -> None:
        for path in paths:
            shutil.rmtree(path)

    def save_state(self, state: SearchState) -> None:
        """Rewrites the log and saves the search's state; arrays that did not change are not written again.

        The log comes first: ahead of the state it is only written again, behind the last state it would stay so.
        """
        self.write_log(state)
        trees, plain = state.to_saved()
        save_search_state(self.path / "state", free_to_plain(trees), plain)

    def state(self) -> SearchState | None:
        """Reads the saved state, if there is one. Raises InputError where it is damaged."""
        saved = load_search_state(self.path / "state")
        if saved is None:
            return None
        trees, plain = saved
        return SearchState.from_saved(free_from_plain(trees), plain)

    def write_log(self, state: SearchState) -> None:
        write_atomically(self.path / "log.jsonl", "".join(json.dumps(to_record(event)) + "\n" for event in state.log))
