"""`cptv bench methods`: every base method at every width, without and with CPT-V on top, in one table."""

import json
import re
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cptv_jax import data
from cptv_jax.bench.row import Task, read_measured
from cptv_jax.bench.table import Cell, lines_of, markdown, near
from cptv_jax.checkpoint import load_float_model, write_atomically
from cptv_jax.config import CalibrationConfig, QuantizeConfig, SearchConfig, load_config, to_mapping
from cptv_jax.data import Images
from cptv_jax.errors import InputError
from cptv_jax.evaluation import check_labels
from cptv_jax.methods import METHODS
from cptv_jax.plan import planned
from cptv_jax.progress import bar
from cptv_jax.quantized import Model
from cptv_jax.recipe import MAX_BITS, MIN_BITS
from cptv_jax.run_directory import claimed, digest, first_difference, refuse_foreign, versions
from cptv_jax.suggest import did_you_mean

KIND = "bench"  # bench.json tells a bench's directory
DEFAULT_BITS = ("W8A8", "W6A6", "W4A4", "W3A3", "W4A8", "W3A8")
DEFAULT_SEARCH = SearchConfig(strategy="generational", passes=1, rounds=2, children=4)
NEAR_POINTS = 1.5
AUTO_SEEDS = (0, 1, 2)
RECONSTRUCTION_STEPS = 150  # a stage, as AIQViT's own
_RECONSTRUCTION = "reconstruction"
_WIDTHS = re.compile(r"W(\d+)A(\d+)")


@dataclass(frozen=True)
class Options:
    """What `cptv bench methods` is asked.

    methods: names in METHODS or NAME/PRESET, each perhaps with +reconstruction (of its blocks, with the steps of
    `config` or RECONSTRUCTION_STEPS), or YAML files of a configuration. bits: such as W4A8. calibration, batch:
    images of a run, as in CalibrationConfig. held_out: further images that only the objective sees. seeds: None means
    the first of AUTO_SEEDS for all, and all of them for runs that are near another. search: on top of each base
    method. config: what all runs share, such as options of methods.
    """

    weights: str
    images: str
    evaluation: str
    out: Path
    arch: str | None = None
    methods: tuple[str, ...] = ()
    bits: tuple[str, ...] = DEFAULT_BITS
    calibration: int = 128
    batch: int = 32
    held_out: int = 100
    seeds: tuple[int, ...] | None = (0,)
    search: SearchConfig = DEFAULT_SEARCH
    config: QuantizeConfig = QuantizeConfig()  # noqa: RUF009 - frozen


@dataclass(frozen=True)
class _Run:
    """A run of the bench; name: of its directory and its files."""

    bits: str
    label: str
    config: QuantizeConfig

    @property
    def name(self) -> str:
        return f"{self.label.replace('/', '-')}_{self.bits}_seed{self.config.seed}"

    def cell(self, measured: dict[str, Any], reason: str) -> Cell:
        return Cell(self.bits, self.label, self.config.seed, self.config.search.strategy, measured, reason)


def search_from(text: str | None) -> SearchConfig:
    """The search that --search names: the `search` section of a YAML file, or no search for "none"."""
    if text is None:
        return DEFAULT_SEARCH
    return SearchConfig(strategy="none") if text == "none" else load_config(text).search


def seeds_from(words: Sequence[str]) -> tuple[int, ...] | None:
    """Seeds, or None for "auto". Raises InputError for anything else."""
    if list(words) == ["auto"]:
        return None
    if not all(word.isdecimal() and int(word) < 2**32 for word in words):
        raise InputError(f"--seeds are {' '.join(words)}; give whole numbers from 0 to 2^32 - 1, or auto")
    return tuple(dict.fromkeys(int(word) for word in words))


def _with_bits(config: QuantizeConfig, bits: str) -> QuantizeConfig:
    parts = _WIDTHS.fullmatch(bits)
    if parts is None or not all(MIN_BITS <= int(part) <= MAX_BITS for part in parts.groups()):
        raise InputError(
            f"--bits has {bits}; write W and A with widths from {MIN_BITS} to {MAX_BITS} bits, such as W4A8"
        )
    return replace(config, recipe=replace(config.recipe, weight_bits=int(parts[1]), activation_bits=int(parts[2])))


def _with_method(config: QuantizeConfig, word: str) -> tuple[str, QuantizeConfig]:
    """The label and the configuration of a method as --methods names it."""
    if word.endswith((".yaml", ".yml")):
        return Path(word).stem, load_config(word)
    word, plus, addition = word.partition("+")
    name, _, preset = word.partition("/")
    if name not in METHODS:
        raise InputError(f"--methods has '{name}'{did_you_mean(name, METHODS)}")
    if preset and preset not in METHODS[name].presets:
        raise InputError(f"--methods has '{word}'{did_you_mean(preset, METHODS[name].presets)}")
    config = replace(config, method=name, recipe=replace(config.recipe, preset=preset or None))
    if not plus:
        return word, config
    if addition != _RECONSTRUCTION:
        raise InputError(f"--methods has '{word}+{addition}'; only +{_RECONSTRUCTION} can stand behind a method")
    steps = config.reconstruction.steps or RECONSTRUCTION_STEPS
    return f"{word}+{addition}", replace(config, reconstruction=replace(config.reconstruction, steps=steps))


def _runs(options: Options, seed: int) -> list[_Run]:
    """The runs of one seed, by width and then by method. Raises InputError for what no run can use."""
    if options.batch > options.calibration:
        raise InputError(f"--batch is {options.batch}, but --calibration only {options.calibration} images; lower it")
    if options.held_out == 1 or options.held_out < 0:
        raise InputError(f"--held-out is {options.held_out}; the objective contrasts images: give 2 or more, or 0")
    calibration = CalibrationConfig(options.calibration, options.batch)
    runs = []
    for bits in dict.fromkeys(options.bits):
        for word in dict.fromkeys(options.methods or METHODS):
            label, config = _with_method(options.config, word)
            config = replace(config, calibration=calibration, search=options.search, seed=seed)
            runs.append(_Run(bits, label, _with_bits(config, bits)))
    return runs


def _refusals(model: Model, images: Images, runs: Sequence[_Run]) -> dict[str, str]:
    """Why runs cannot be, by name. Raises InputError where none can, for one reason."""
    refused = {}
    for run in runs:
        try:
            planned(model, images.take(slice(0, run.config.calibration.images)), run.config)
        except InputError as error:
            refused[run.name] = str(error)
    if len(refused) == len(runs) and len(set(refused.values())) == 1:
        raise InputError(next(iter(refused.values())))
    return refused


def bench_methods(options: Options, progress: bool = True) -> list[dict[str, Any]]:
    """Runs what is not yet measured, writes methods.md and methods.json into `options.out` after each run, and returns
    the lines of the table.

    A run that fails has its reason in the table and stops no other. Raises InputError for settings that no run can
    use, and for an `out` that is something else than this bench.
    """
    first, *others = AUTO_SEEDS if options.seeds is None else options.seeds
    runs = _runs(options, first)
    refuse_foreign(options.out, KIND)
    model = load_float_model(options.weights, options.arch)
    count = options.calibration + options.held_out
    images = data.load(
        options.images, model.architecture.preprocessing, labels=False, limit=count, need=count, seed=first
    )
    evaluation = data.load(options.evaluation, model.architecture.preprocessing, labels=True)
    check_labels(model.stages(), evaluation)
    refused = _refusals(model, images, runs)
    identity = {
        "weights": digest(model.weights),
        "images": options.images,
        "evaluation": digest([evaluation.pixels, evaluation.require_labels()]),
        "calibration": options.calibration,
        "batch": options.batch,
        "held-out": options.held_out,
        "search": to_mapping(options.search),
        "config": to_mapping(options.config),
    }
    del model, images, evaluation
    with claimed(options.out, KIND):
        _check_identity(options.out, identity)
        bench = _Bench(options, identity, refused)
        bench.run(runs, progress)
        if others:
            again = [run for run in runs if run.name not in refused]
            if options.seeds is None:
                rivals = near([bench.cells[run.name] for run in runs], NEAR_POINTS)
                again = [run for run in runs if bench.cells[run.name] in rivals]
            bench.run([replace(run, config=replace(run.config, seed=s)) for s in others for run in again], progress)
        return bench.write()


def _check_identity(out: Path, identity: dict[str, Any]) -> None:
    path = out / f"{KIND}.json"
    if path.exists():
        different = first_difference(read_measured(path), json.loads(json.dumps(identity)))
        if different:
            raise InputError(
                f"{out} holds a bench with other settings ({different}); choose another --out, or repeat the original "
                "command to continue it"
            )
    write_atomically(path, json.dumps(identity, indent=1))


class _Bench:
    """The runs of a bench, each in a child process, and what came of them so far.

    refused: reasons known beforehand, by name of the run.
    """

    def __init__(self, options: Options, identity: dict[str, Any], refused: dict[str, str]) -> None:
        self.options = options
        self.identity = identity
        self.refused = refused
        self.cells: dict[str, Cell] = {}
        self.folder = options.out / "runs"
        self.folder.mkdir(exist_ok=True)

    def run(self, runs: Sequence[_Run], progress: bool) -> None:
        """Measures those that are not measured yet."""
        with bar("bench", len(runs), progress) as shown:
            for run in runs:
                shown.set_description(f"bench {run.name}")
                self.cells[run.name] = self._cell(run)
                self.write()
                shown.update(1)

    def write(self) -> list[dict[str, Any]]:
        """The table so far, as it is written to methods.md and methods.json."""
        lines = lines_of(list(self.cells.values()))
        measured = (cell.measured for cell in self.cells.values() if cell.done)
        teacher = next((found["accuracy"]["float"] for found in measured), None)
        heading = f"Full precision: {teacher['top1']:.2f} % of {teacher['images']} images.\n\n" if teacher else ""
        write_atomically(self.options.out / "methods.md", heading + markdown(lines))
        whole = {"settings": self.identity, "versions": versions(), "float": teacher, "lines": lines}
        write_atomically(self.options.out / "methods.json", json.dumps(whole, indent=1))
        return lines

    def _cell(self, run: _Run) -> Cell:
        if run.name in self.refused:
            return run.cell({}, f"not possible: {self.refused[run.name]}")
        path = self.folder / f"{run.name}.json"
        if not read_measured(path).get("done"):
            options = self.options
            task = Task(
                options.weights, options.arch, options.images, options.evaluation, options.held_out, run.config,
                self.folder / run.name, path,
            )  # fmt: skip
            code, reason = run_child(task, path.with_suffix(".log"))
            if code:
                refusal = read_measured(path).get("refused") if code == 2 else None
                return run.cell({}, f"not possible: {refusal}" if refusal else f"failed: {reason}")
        return run.cell(read_measured(path), "")


def run_child(task: Task, log: Path) -> tuple[int, str]:
    """Measures a task in a process of its own; its exit code, and the last it said where that is not 0."""
    command = [sys.executable, "-m", "cptv_jax.bench.row"]
    with (
        log.open("w", encoding="utf-8") as said,
        # Unbuffered, so that nothing is left to be written to a child that ended before it read.
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=said, stderr=said, bufsize=0) as child,
    ):
        assert child.stdin is not None
        with suppress(BrokenPipeError):  # its exit code says why
            child.stdin.write(f"{task.to_json()}\n".encode())  # and left open: its end would be the child's
        try:
            code = child.wait()
        except BaseException:
            child.kill()
            raise
    if code == 0:
        return 0, ""
    if code < 0:
        return code, f"ended by signal {-code}; see {log}"
    lines = [line.strip() for line in log.read_text(encoding="utf-8").splitlines() if line.strip()]
    return code, f"{lines[-1] if lines else f'exit code {code}'}; see {log}"
