"""The parts that all benches share: a table whose rows are runs of `cptv quantize`, each in a separate process."""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cptv_jax import data
from cptv_jax.bench.children import Children
from cptv_jax.bench.table import Cell
from cptv_jax.bench.worker import Task, read_measured
from cptv_jax.config.loading import config_from
from cptv_jax.config.older import is_older, translate, translate_search
from cptv_jax.config.schema import QuantizeConfig, SearchConfig
from cptv_jax.data import Images
from cptv_jax.errors import InputError
from cptv_jax.evaluation import check_labels, check_unseen
from cptv_jax.options import flatten, from_mapping, to_mapping
from cptv_jax.pipeline.plan import make_plan
from cptv_jax.progress import bar
from cptv_jax.quantized.model import Model
from cptv_jax.recipe.spec import MAX_BITS, MIN_BITS
from cptv_jax.runtime.mesh import share_accelerator
from cptv_jax.storage.files import digest, first_difference, lock, refuse_foreign, write_atomically
from cptv_jax.storage.models import load_float_model

KIND = "bench"  # bench.json tells a bench's directory
AUTO_SEEDS = (0, 1, 2)
Line = dict[str, Any]
_WIDTHS = re.compile(r"W(\d+)A(\d+)")


@dataclass(frozen=True)
class Source:
    """The inputs of all runs of a bench, and how they are run.

    Attributes:
        weights: The float model, as `cptv quantize` takes it.
        images: Calibration images, as `cptv quantize` takes them.
        evaluation: Labelled images.
        arch: The timm name; None if the weights tell it.
        held_out: Number of further calibration images that only the objective is measured on.
        jobs: How many runs go at once.
    """

    weights: str
    images: str
    evaluation: str
    arch: str | None = None
    held_out: int = 100
    jobs: int = 1


@dataclass(frozen=True)
class Table:
    """How a bench shows its measurements.

    Attributes:
        name: Stem of its files.
        lines_of: Turns cells into lines of plain data.
        markdown: Turns these lines into a Markdown table.
    """

    name: str
    lines_of: Callable[[Sequence[Cell]], list[Line]]
    markdown: Callable[[Sequence[Line]], str]


@dataclass(frozen=True)
class Run:
    """A run of a bench.

    Attributes:
        bits: The widths, such as W4A8.
        label: The run's name in the table.
        config: Its configuration.
    """

    bits: str
    label: str
    config: QuantizeConfig

    @property
    def name(self) -> str:
        """The name of the run's directory and its files."""
        label = re.sub(r"[^\w.+]+", "-", self.label)  # what a file can be named by
        return f"{label}_{self.bits}_seed{self.config.seed}"

    def cell(self, measured: dict[str, Any], reason: str) -> Cell:
        """Makes the run's cell.

        Args:
            measured: What the worker measured; empty if there is nothing yet.
            reason: Why there is nothing.

        Returns:
            The cell.
        """
        return Cell(self.bits, self.label, self.config.seed, self.config.search.strategy.name, measured, reason)


def seeds_from(words: Sequence[str]) -> tuple[int, ...] | None:
    """Reads the words of --seeds.

    Args:
        words: Whole numbers, or "auto" alone.

    Returns:
        The seeds without repetitions; None for "auto".

    Raises:
        InputError: If a word is not a whole number from 0 to 2^32 - 1.
    """
    if list(words) == ["auto"]:
        return None
    if not all(word.isdecimal() and int(word) < 2**32 for word in words):
        raise InputError(f"--seeds are {' '.join(words)}; give whole numbers from 0 to 2^32 - 1, or auto")
    return tuple(dict.fromkeys(int(word) for word in words))


def with_bits(config: QuantizeConfig, bits: str) -> QuantizeConfig:
    """Sets the widths of a configuration.

    Args:
        config: The configuration.
        bits: Widths such as W4A8.

    Returns:
        The configuration with these widths.

    Raises:
        InputError: If the text does not have this form, or a width is out of bounds.
    """
    parts = _WIDTHS.fullmatch(bits)
    if parts is None or not all(MIN_BITS <= int(part) <= MAX_BITS for part in parts.groups()):
        raise InputError(
            f"--bits has {bits}; write W and A with widths from {MIN_BITS} to {MAX_BITS} bits, such as W4A8"
        )
    return replace(config, recipe=replace(config.recipe, weight_bits=int(parts[1]), activation_bits=int(parts[2])))


def refuse_set(config: QuantizeConfig, options: Mapping[str, str]) -> None:
    """Refuses a --config that sets fields for which a bench has other options.

    Args:
        config: The configuration of --config.
        options: The bench's option by dotted name of the field or section.

    Raises:
        InputError: If such a field differs from its default.
    """
    given, usual = flatten(config), flatten(QuantizeConfig())
    for prefix, option in options.items():
        for name in given:
            if f"{name}.".startswith(f"{prefix}.") and given[name] != usual.get(name):
                raise InputError(f"--config sets {name}, which a bench has an option of its own for; use --{option}")


class Bench:
    """The runs of a bench, each in a child process, and their results so far.

    Args:
        source: The inputs of all runs.
        out: The bench's directory.
        table: How the results are shown.
        identity: Settings that tell this bench from others.
        refused: Reasons known beforehand why runs cannot work, by name of the run.
    """

    def __init__(
        self, source: Source, out: Path, table: Table, identity: dict[str, Any], refused: dict[str, str]
    ) -> None:
        self.source = source
        self.out = out
        self.table = table
        self.identity = identity
        self.refused = refused
        self.cells: dict[str, Cell] = {}
        self._order: dict[str, int] = {}  # of runs in the table, by name
        self._children = Children(share_accelerator(source.jobs))
        self.folder = out / "runs"
        self.folder.mkdir(exist_ok=True)

    def run(self, runs: Sequence[Run], progress: bool) -> None:
        """Measures the runs that are not measured yet.

        Args:
            runs: The runs.
            progress: Whether to show a bar.
        """
        self._order |= {run.name: len(self._order) + i for i, run in enumerate(runs)}
        with bar("bench", len(runs), progress) as shown, ThreadPoolExecutor(self.source.jobs) as pool:
            waiting = {pool.submit(self._cell, run): run.name for run in runs}
            try:
                for done in as_completed(waiting):
                    name = waiting[done]
                    self.cells[name] = done.result()
                    self.write()
                    shown.set_postfix_str(name)
                    shown.update(1)
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                self._children.end()
                raise

    def write(self) -> list[Line]:
        """Writes the table so far to a Markdown and a JSON file.

        The JSON file names every set of versions that rows were measured with.

        Returns:
            The lines of the table.
        """
        lines = self.table.lines_of([self.cells[name] for name in sorted(self.cells, key=self._order.__getitem__)])
        measured = [cell.measured for cell in self.cells.values() if cell.done]
        teacher = next((found["accuracy"]["float"] for found in measured), None)
        versions = {json.dumps(found["versions"]): found["versions"] for found in measured if "versions" in found}
        heading = f"Full precision: {teacher['top1']:.2f} % of {teacher['images']} images.\n\n" if teacher else ""
        write_atomically(self.out / f"{self.table.name}.md", heading + self.table.markdown(lines))
        whole = {"settings": self.identity, "versions": list(versions.values()), "float": teacher, "lines": lines}
        write_atomically(self.out / f"{self.table.name}.json", json.dumps(whole, indent=1))
        return lines

    def _cell(self, run: Run) -> Cell:
        if run.name in self.refused:
            return run.cell({}, f"not possible: {self.refused[run.name]}")
        path = self.folder / f"{run.name}.json"
        found, config = read_measured(path), to_mapping(run.config)
        if found.get("done"):
            _refuse_other(f"{path} was measured", _present(found.get("config", config)), config)
        else:
            read = self.source
            task = Task(
                read.weights, read.arch, read.images, read.evaluation, read.held_out, run.config,
                self.folder / run.name, path,
            )  # fmt: skip
            code, reason = self._children.run(task, path.with_suffix(".log"))
            if code:
                refusal = read_measured(path).get("refused") if code == 2 else None
                return run.cell({}, f"not possible: {refusal}" if refusal else f"failed: {reason}")
        return run.cell(read_measured(path), "")


@contextmanager
def opened(source: Source, out: Path, table: Table, settings: dict[str, Any], runs: Sequence[Run]) -> Iterator[Bench]:
    """Opens a bench in a directory that this process locks; an interrupted bench continues.

    Args:
        source: The inputs of all runs.
        out: The bench's directory.
        table: How the results are shown.
        settings: Further settings that tell this bench from others: those that all runs share.
        runs: The first seed's runs.

    Yields:
        The bench.

    Raises:
        InputError: If no run can use the settings, or if `out` holds something other than this bench.
    """
    if source.jobs < 1:
        raise InputError(f"--jobs is {source.jobs}; give 1 or more")
    if source.held_out == 1 or source.held_out < 0:
        raise InputError(f"--held-out is {source.held_out}; the objective contrasts images: give 2 or more, or 0")
    refuse_foreign(out, KIND)
    model = load_float_model(source.weights, source.arch)
    count = max(run.config.calibration.images for run in runs) + source.held_out
    # Every run draws by its own seed; this draw only tells one folder from another, whatever seeds are asked for.
    images = data.load(source.images, model.architecture.preprocessing, labels=False, limit=count, need=count, seed=0)
    evaluation = data.load(source.evaluation, model.architecture.preprocessing, labels=True)
    check_labels(model.stages(), evaluation)
    check_unseen(evaluation, images)
    refused = _refusals(model, images, runs)
    identity = {
        "weights": digest(model.weights),
        "images": source.images,
        "evaluation": digest([evaluation.pixels, evaluation.require_labels()]),
        "held-out": source.held_out,
        **settings,
        "calibration images": digest(images.pixels),  # last: also other counts, which are named above, make it another
    }
    del model, images, evaluation
    configs: dict[str, QuantizeConfig] = {}
    for run in runs:
        if configs.setdefault(run.name, run.config) != run.config:
            raise InputError(f"two different runs would be called {run.name}; give one of their files another name")
    with lock(out, KIND):
        check_identity(out, identity)
        yield Bench(source, out, table, identity, refused)


def _refusals(model: Model, images: Images, runs: Sequence[Run]) -> dict[str, str]:
    """Collects the reasons why runs cannot work, by name. Raises InputError if none can, all for one reason."""
    refused = {}
    for run in runs:
        try:
            make_plan(model, images.take(slice(0, run.config.calibration.images)), run.config)
        except InputError as error:
            refused[run.name] = str(error)
    if len(refused) == len(runs) and len(set(refused.values())) == 1:
        raise InputError(next(iter(refused.values())))
    return refused


def check_identity(out: Path, identity: dict[str, Any]) -> None:
    """Writes the identity of a bench, or compares it with the one already there.

    Args:
        out: The bench's directory.
        identity: Settings that tell this bench from others.

    Raises:
        InputError: If `out` holds another bench.
    """
    path = out / f"{KIND}.json"
    if path.exists():
        _refuse_other(f"{out} holds a bench", _present_settings(read_measured(path)), identity)
    write_atomically(path, json.dumps(identity, indent=1))


def _present(config: dict[str, Any]) -> dict[str, Any]:
    """A saved configuration in the present form: rows that were measured with an older one stay good."""
    if not is_older(config):
        return config
    return dict(to_mapping(config_from(translate(config), "a row that was measured earlier")))


def _present_settings(identity: dict[str, Any]) -> dict[str, Any]:
    """The settings of a bench, with the configurations among them in the present form."""
    found = dict(identity)
    if is_older(found.get("config", {})):
        found["config"] = _present(found["config"])
    if is_older({"search": found.get("search", {})}):
        search = translate_search(found["search"])
        found["search"] = to_mapping(from_mapping(SearchConfig, search, "a bench that was begun earlier"))
    return found


def _refuse_other(what: str, there: dict[str, Any], here: dict[str, Any]) -> None:
    """Raises InputError where settings differ from those that were saved as JSON."""
    different = first_difference(json.loads(json.dumps(there)), json.loads(json.dumps(here)))
    if different:
        raise InputError(
            f"{what} with other settings ({different}); choose another --out, or repeat the original command to "
            "continue it"
        )
