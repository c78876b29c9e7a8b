"""A run's directory: what was asked for, how far it got, and its results."""

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


class RunDirectory:
    """The files of one run.

    * config.yaml: the resolved configuration.
    * run.json: the format of the directory, the run's identity (configuration, model, images) and versions.
    * base/, model/: checkpoints before and after the search.
    * reconstruction/: while blocks are reconstructed, the model so far, named by the number of stages that are done.
    * state/: where the search stands.
    * results.json: accuracies.
    * log.jsonl: accepted steps and passes.

    One process at a time works in a run, under `files.lock`.
    """

    def __init__(self, path: Path, identity: Mapping[str, Any]) -> None:
        """Opens a directory: a new one, or that of an interrupted run.

        Args:
            path: The directory, made if need be.
            identity: Everything that determines the result, as plain data; "config" is the configuration.

        Raises:
            InputError: The directory holds anything other than a run of this format with the same identity.
        """
        self.path = path
        refuse_foreign(path)
        known = path / RUN_FILE
        identity = json.loads(json.dumps(identity))  # as it will be read back
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
        # Leftovers of an interruption.
        remove_leftovers(path / "state")
        if (path / "base").exists():
            self.drop_reconstruction()
        else:
            self._drop(self._list_numbered("reconstruction")[:-1])

    def _refuse_other_versions(self, begun: Mapping[str, Any]) -> None:
        """Refuses to continue with other versions than the run began with: the result would belong to neither.

        Raises:
            InputError: The run is unfinished, and versions differ.
        """
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
        """Returns the base method's model, if it was finished."""
        return self._load_quantized("base")

    def final(self) -> QuantizedModel | None:
        """Returns the final model, if the run got that far."""
        return self._load_quantized("model")

    def save_reconstruction(self, done: int, model: QuantizedModel) -> None:
        """Saves a model whose first stages are reconstructed, then drops earlier ones.

        Args:
            done: How many stages are reconstructed.
            model: The model.
        """
        earlier = self._list_numbered("reconstruction")
        save_model(self.path / "reconstruction" / f"{done:06d}", model)
        self._drop(earlier)

    def reconstruction(self) -> tuple[int, QuantizedModel] | None:
        """Returns how many stages are reconstructed, and the model so far; None where none is saved."""
        saved = self._list_numbered("reconstruction")
        if not saved:
            return None
        model = self._load_quantized(f"reconstruction/{saved[-1].name}")
        assert model is not None
        return int(saved[-1].name), model

    def drop_reconstruction(self) -> None:
        """Removes the models of an unfinished reconstruction."""
        if (self.path / "reconstruction").exists():
            shutil.rmtree(self.path / "reconstruction")

    def _load_quantized(self, name: str) -> QuantizedModel | None:
        """Loads a checkpoint of the run.

        Returns:
            The model, or None where there is none.

        Raises:
            InputError: The checkpoint is damaged.
        """
        if not (self.path / name).exists():
            return None
        model = load_model(str(self.path / name))
        if not isinstance(model, QuantizedModel):
            raise InputError(f"{self.path / name} is not a quantized model; the run is damaged, choose another --out")
        return model

    def save_base(self, model: QuantizedModel) -> None:
        """Saves the base method's model.

        Args:
            model: The model.
        """
        save_model(self.path / "base", model)

    def save_final(self, model: QuantizedModel) -> None:
        """Saves the final model.

        Args:
            model: The model.
        """
        save_model(self.path / "model", model)

    def results(self) -> dict[str, Any]:
        """Reads the measurements so far.

        Returns:
            The measurements by name.

        Raises:
            InputError: The file is damaged.
        """
        path = self.path / "results.json"
        try:
            return dict(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else {}
        except (ValueError, TypeError):
            raise InputError(f"{path} is damaged; remove it, and the same command measures again") from None

    def save_results(self, results: Mapping[str, Any]) -> None:
        """Saves the measurements so far.

        Args:
            results: The measurements by name.
        """
        write_atomically(self.path / "results.json", json.dumps(results, indent=1))

    def _list_numbered(self, folder: str) -> list[Path]:
        return sorted(self.path.glob(f"{folder}/[0-9]*"))

    def _drop(self, paths: list[Path]) -> None:
        for path in paths:
            shutil.rmtree(path)

    def save_state(self, state: SearchState) -> None:
        """Rewrites the log and saves the search's state; arrays that did not change are not written again.

        The log is written first. A log ahead of the state is merely written again; a log behind the last state would
        stay so.

        Args:
            state: The search's state.
        """
        self.write_log(state)
        trees, plain = state.to_saved()
        save_search_state(self.path / "state", free_to_plain(trees), plain)

    def state(self) -> SearchState | None:
        """Reads the saved state of the search.

        Returns:
            The state, or None where none is saved.

        Raises:
            InputError: The state is damaged.
        """
        saved = load_search_state(self.path / "state")
        if saved is None:
            return None
        trees, plain = saved
        return SearchState.from_saved(free_from_plain(trees), plain)

    def write_log(self, state: SearchState) -> None:
        """Writes the log of the search.

        Args:
            state: The search's state, which holds the events.
        """
        write_atomically(self.path / "log.jsonl", "".join(json.dumps(to_record(event)) + "\n" for event in state.log))
