"""`cptv bench methods`: every base method at every width, without and with CPT-V on top, in one table."""

from dataclasses import dataclass, replace
from pathlib import Path

from cptv_jax.bench.harness import AUTO_SEEDS, Line, Run, Source, Table, opened, refuse_set, with_bits
from cptv_jax.bench.table import lines_of, markdown, near
from cptv_jax.config.loading import load_config
from cptv_jax.config.schema import CalibrationConfig, QuantizeConfig, SearchConfig
from cptv_jax.errors import InputError, did_you_mean
from cptv_jax.methods.registry import METHODS
from cptv_jax.options import to_mapping
from cptv_jax.search import Guided, NoSearch

TABLE = Table("methods", lines_of, markdown)
DEFAULT_BITS = ("W8A8", "W6A6", "W4A4", "W3A3", "W4A8", "W3A8")
DEFAULT_SEARCH = SearchConfig(strategy=Guided(steps=60))
NEAR_POINTS = 1.5
RECONSTRUCTION_STEPS = 60  # a stage, as AIQViT's own
_RECONSTRUCTION = "reconstruction"
_OWN_OPTIONS = {
    "recipe.preset": "methods NAME/PRESET",
    "recipe.weight_bits": "bits",
    "recipe.activation_bits": "bits",
    "calibration": "calibration and --batch",
    "search": "search",
    "seed": "seeds",
}


@dataclass(frozen=True)
class Options:
    """The options of `cptv bench methods`.

    Attributes:
        weights: The float model, as `cptv quantize` takes it.
        images: Calibration images, as `cptv quantize` takes them.
        evaluation: Labelled images.
        out: The bench's directory.
        arch: The timm name; None if the weights tell it.
        methods: Names in METHODS or NAME/PRESET, each optionally with +reconstruction (of its blocks, with the steps of
            `config` or RECONSTRUCTION_STEPS), or YAML files of a configuration. From a file, everything counts except
            the settings that the bench shares among all runs: widths, calibration, search and seed. Empty means all
            methods.
        bits: Widths such as W4A8.
        calibration: Calibration images of a run, as in CalibrationConfig.
        batch: Images per batch, as in CalibrationConfig.
        held_out: Number of further images that only the objective is measured on.
        seeds: None means the first of AUTO_SEEDS for all runs, and all of them for runs that are near another.
        search: The search on top of each base method.
        config: Settings that all runs share; options of its method count for the runs of that method.
        jobs: How many runs go at once.
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
    jobs: int = 1


def search_from(text: str | None) -> SearchConfig:
    """Reads the search that --search names.

    Args:
        text: A YAML file whose `search` section counts, or "none"; None means DEFAULT_SEARCH.

    Returns:
        The search's configuration.
    """
    if text is None:
        return DEFAULT_SEARCH
    return SearchConfig(strategy=NoSearch()) if text == "none" else load_config(text).search


def _is_file(word: str) -> bool:
    return word.endswith((".yaml", ".yml"))


def _with_method(config: QuantizeConfig, word: str) -> tuple[str, QuantizeConfig]:
    """The label and the configuration of a method as --methods names it."""
    if _is_file(word):
        return Path(word).stem, load_config(word)
    word, plus, addition = word.partition("+")
    name, _, preset = word.partition("/")
    if name not in METHODS:
        raise InputError(f"--methods has '{name}'{did_you_mean(name, METHODS)}")
    if preset and preset not in METHODS[name].presets:
        raise InputError(f"--methods has '{word}'{did_you_mean(preset, METHODS[name].presets)}")
    method = config.method if config.method.name == name else METHODS[name].options()
    config = replace(config, method=method, recipe=replace(config.recipe, preset=preset or None))
    if not plus:
        return word, config
    if addition != _RECONSTRUCTION:
        raise InputError(f"--methods has '{word}+{addition}'; only +{_RECONSTRUCTION} can stand behind a method")
    steps = config.reconstruction.steps or RECONSTRUCTION_STEPS
    return f"{word}+{addition}", replace(config, reconstruction=replace(config.reconstruction, steps=steps))


def _check_shared_method(options: Options) -> None:
    """Raises InputError for a --config whose method, or whose options of it, no run would have."""
    method, usual = options.config.method, QuantizeConfig().method
    if method == usual:
        return
    if method == type(method)():
        raise InputError("--config sets method, which a bench has an option of its own for; use --methods")
    words = [word for word in options.methods or METHODS if not _is_file(word)]
    if method.name not in (word.partition("+")[0].partition("/")[0] for word in words):
        raise InputError(f"--config has options of {method.name}, which is not among --methods; name it there")


def _runs(options: Options, seed: int) -> list[Run]:
    """The runs of one seed, by width and then by method. Raises InputError for what no run can use."""
    if options.batch > options.calibration:
        raise InputError(f"--batch is {options.batch}, but --calibration only {options.calibration} images; lower it")
    refuse_set(options.config, _OWN_OPTIONS)
    _check_shared_method(options)
    if options.config != QuantizeConfig() and any(map(_is_file, options.methods)):
        raise InputError("--config does not reach a method of a YAML file; write what it shall share into that file")
    calibration = CalibrationConfig(options.calibration, options.batch)
    runs = []
    for bits in dict.fromkeys(options.bits):
        for word in dict.fromkeys(options.methods or METHODS):
            label, config = _with_method(options.config, word)
            config = replace(config, calibration=calibration, search=options.search, seed=seed)
            runs.append(Run(bits, label, with_bits(config, bits)))
    return runs


def bench_methods(options: Options, progress: bool = True) -> list[Line]:
    """Measures every base method at every width, without and with the search.

    Only missing runs are measured; methods.md and methods.json in `options.out` are written after each run. A run that
    fails has its reason in the table and stops no other.

    Args:
        options: The options.
        progress: Whether to show a bar.

    Returns:
        The lines of the table.

    Raises:
        InputError: If no run can use the settings, or if `out` holds something other than this bench.
    """
    first, *others = AUTO_SEEDS if options.seeds is None else options.seeds
    runs = _runs(options, first)
    settings = {
        "calibration": options.calibration,
        "batch": options.batch,
        "search": to_mapping(options.search),
        "config": to_mapping(options.config),
    }
    source = Source(options.weights, options.images, options.evaluation, options.arch, options.held_out, options.jobs)
    with opened(source, options.out, TABLE, settings, runs) as bench:
        bench.run(runs, progress)
        if others:
            again = [run for run in runs if run.name not in bench.refused]
            if options.seeds is None:
                rivals = near([bench.cells[run.name] for run in runs], NEAR_POINTS)
                again = [run for run in runs if bench.cells[run.name] in rivals]
            bench.run([replace(run, config=replace(run.config, seed=s)) for s in others for run in again], progress)
        return bench.write()
