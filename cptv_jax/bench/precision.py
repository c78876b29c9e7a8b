"""`cptv bench precision`: accuracy against cost, of uniform widths and of mixed ones that cost no more."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from cptv_jax import data
from cptv_jax.bench.harness import KIND, Line, Source, check_identity
from cptv_jax.bench.table import rows_of
from cptv_jax.config.schema import QuantizeConfig, SearchConfig
from cptv_jax.data import Images
from cptv_jax.errors import InputError, did_you_mean
from cptv_jax.evaluation import check_labels, check_unseen, evaluate
from cptv_jax.methods.registry import METHODS
from cptv_jax.mixed_precision.allocation import Genes, allocate, evolve_genes, sensitivities
from cptv_jax.mixed_precision.widths import Widths, find_product_sites, loss_of_genes
from cptv_jax.options import to_mapping
from cptv_jax.pipeline.judging import evaluator_of, outputs_of
from cptv_jax.pipeline.plan import Plan, make_plan
from cptv_jax.progress import bar
from cptv_jax.quantized.model import Model, QuantizedModel
from cptv_jax.recipe.spec import MAX_BITS, MIN_BITS
from cptv_jax.report.plots import plotted
from cptv_jax.runtime.mesh import make_mesh
from cptv_jax.search import Evaluator, NoSearch, Objective
from cptv_jax.storage.files import digest, lock, refuse_foreign, write_atomically
from cptv_jax.storage.models import load_float_model, save_model

NAME = "precision"
DEFAULT_BITS = tuple(range(MIN_BITS, MAX_BITS + 1))
GENES = ("weights", "all")
OBJECTIVE = "kl"  # of the logits of classes, where none is named
BUDGETS = {"bytes": ("MiB of weights", 2.0**20), "bit-operations": ("10^9 bit operations an image", 1e9)}
_COLUMNS = ("uniform top-1 %", "mixed top-1 %", "uniform objective", "mixed objective")


@dataclass(frozen=True)
class PrecisionOptions:
    """The options of `cptv bench precision`.

    Attributes:
        source: The inputs of the bench.
        out: The bench's directory.
        bits: The widths that a site may have.
        images: How many of the calibration images of `config` judge genes, in whole batches.
        generations: Generations of the evolution at every budget.
        children: Candidates per generation.
        config: Base method, recipe (its weight_bits are replaced), calibration, objective (null means KL) and seed.
        genes: The sites with separate widths: "weights", or "all" that products read; other activations have the
            recipe's.
        budget: The cost in which mixed widths may equal uniform ones, a key of BUDGETS.
    """

    source: Source
    out: Path
    bits: tuple[int, ...] = DEFAULT_BITS
    images: int = 200
    generations: int = 6
    children: int = 4
    config: QuantizeConfig = QuantizeConfig()  # noqa: RUF009 - frozen
    genes: str = "weights"
    budget: str = "bytes"


def _at_width(config: QuantizeConfig, bits: int, activations: Sequence[str] = ()) -> QuantizeConfig:
    """The configuration with weights, and the named activations, of a width; what it overrides stays."""
    overrides = {**{site: {"bits": bits} for site in activations}, **config.recipe.overrides}
    recipe = replace(config.recipe, weight_bits=bits, overrides=overrides)
    return replace(config, recipe=recipe, search=SearchConfig(strategy=NoSearch()))


def _plans(model: Model, images: Images, options: PrecisionOptions, widths: Sequence[int]) -> dict[int, Plan]:
    """The plans of uniform widths."""
    config = options.config
    activations: tuple[str, ...] = ()
    if options.genes == "all":
        recipe = make_plan(model, images, _at_width(config, widths[0])).recipe
        activations = tuple(site for site in find_product_sites(model, recipe) if recipe.places[site].role != "weight")
    return {bits: make_plan(model, images, _at_width(config, bits, activations)) for bits in widths}


def _check_options(options: PrecisionOptions, widths: Sequence[int], objective: Objective) -> None:
    """Raises InputError for options that cannot work, whatever the model and the images are."""
    if len(widths) < 2:
        raise InputError(f"--bits are {list(widths)}; mixed precision needs 2 widths or more")
    for flag, word, known in (("genes", options.genes, GENES), ("budget", options.budget, BUDGETS)):
        if word not in known:
            raise InputError(f"--{flag} is '{word}'{did_you_mean(word, known)}")
    if options.genes == "all" and options.budget == "bytes":
        raise InputError("the widths of activations cost no bytes; set --budget bit-operations, or --genes weights")
    for flag, number, least in (("generations", options.generations, 0), ("children", options.children, 1)):
        if number < least:
            raise InputError(f"--{flag} is {number}; it must be at least {least}")
    calibration, search = options.config.calibration, options.config.search
    for field, value, unused in (
        ("compute.race", search.compute.race, search.compute.race),
        ("judge.teacher", search.judge.teacher, search.judge.teacher != "float"),
    ):
        if unused:
            raise InputError(f"search.{field} is {value}, which has no meaning here; leave it out")
    if "infonce" in objective.names and calibration.batch < 2:
        raise InputError("calibration.batch is 1, but infonce contrasts the images of a batch; set it to at least 2")
    if not calibration.batch <= options.images <= calibration.images:
        raise InputError(
            f"--judges is {options.images}; it must lie between calibration.batch, {calibration.batch}, and "
            f"calibration.images, {calibration.images}"
        )


def _check_base(plan: Plan, genes: str) -> None:
    """Raises InputError for a base method whose models differ in more than the widths that are chosen."""
    kept = [name for name, method in METHODS.items() if not (method.rewrites_weights or method.couples_widths)]
    if plan.method.rewrites_weights:
        raise InputError(
            f"method {plan.method.name} makes other weights at every width; set method to {' or '.join(kept)}"
        )
    if plan.method.couples_widths and genes == "weights":
        raise InputError(
            f"method {plan.method.name} fits other scales of activations to every width of weights; "
            f"set method to {' or '.join(kept)}, or choose both: --genes all --budget bit-operations"
        )
    if plan.reconstruction.steps:
        raise InputError(
            f"reconstruction.steps is {plan.reconstruction.steps}, but it makes other weights at every width; "
            "leave it out"
        )


def _models(model: Model, plans: dict[int, Plan], progress: bool) -> Widths:
    """The base method's models of all widths."""
    found: list[QuantizedModel] = []
    with bar("calibrate", len(plans), progress) as shown:
        for plan in plans.values():
            found.append(plan.base_model(model, lambda done, total: None))
            shown.update(1)
    return Widths(tuple(found))


class _Kept:
    """Measurements by name, in a JSON file that is rewritten after each: an interrupted bench goes on.

    Raises InputError where that file is damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        except ValueError:
            raise InputError(f"{path} is damaged; remove it, and the same command measures again") from None

    def get(self, name: str, measure: Callable[[], Any]) -> Any:
        if name not in self.found:
            self.found[name] = measure()
            write_atomically(self.path, json.dumps(self.found))
        return self.found[name]


def bench_precision(options: PrecisionOptions, progress: bool = True) -> list[Line]:
    """Measures uniform widths and, at the cost of each but the widest, mixed ones.

    Genes are chosen by the objective on calibration images; evaluation images only fill the table. The function writes
    precision.md, .json and .png and the mixed models into `options.out`.

    Args:
        options: The options.
        progress: Whether to show a bar.

    Returns:
        The lines of the table.

    Raises:
        InputError: If the settings cannot work, or if `out` holds something other than this bench.
    """
    source, config = options.source, options.config
    widths = tuple(sorted(set(options.bits)))
    judge = config.search.judge
    objective, compute = Objective(judge.objective or OBJECTIVE, judge.on, judge.temperature), config.search.compute
    _check_options(options, widths, objective)
    refuse_foreign(options.out, KIND)
    model = load_float_model(source.weights, source.arch)
    wanted, batch = config.calibration.images, config.calibration.batch
    given = data.load(
        source.images, model.architecture.preprocessing, labels=False, limit=wanted, need=wanted, seed=config.seed
    )
    evaluation = data.load(source.evaluation, model.architecture.preprocessing, labels=True)
    check_labels(model.stages(), evaluation)
    check_unseen(evaluation, given)
    plans = _plans(model, given, options, widths)
    _check_base(plans[widths[0]], options.genes)
    batches = plans[widths[0]].split.calibration[: options.images // batch]
    identity = {
        "weights": digest(model.weights),
        "images": digest(given.pixels),
        "evaluation": digest([evaluation.pixels, evaluation.require_labels()]),
        "bits": widths,
        "judges": len(batches) * batch,
        "generations": options.generations,
        "children": options.children,
        "genes": options.genes,
        "budget": options.budget,
        "config": to_mapping(config),
    }
    with lock(options.out, KIND):
        check_identity(options.out, identity)
        kept = _Kept(options.out / f"{NAME}-measured.json")
        models = _models(model, plans, progress)
        teacher = outputs_of(model.stages(), batches, compute, progress, "teacher outputs")
        stages = models.stages(compute.arithmetic)
        evaluator = evaluator_of(stages, batches, teacher, objective, compute, 1, make_mesh())
        return _measured(options, models, evaluator, kept, lambda q: evaluate(q.stages(), evaluation).top1, progress)


def _measured(
    options: PrecisionOptions,
    models: Widths,
    judge: Evaluator,
    kept: _Kept,
    accuracy: Callable[[QuantizedModel], float],
    progress: bool,
) -> list[Line]:
    costs, widths = models.bytes_of_weights() if options.budget == "bytes" else models.bit_operations(), models.bits
    children = options.generations * options.children * (len(widths) - 1)
    total = len(models.sites) * len(widths) + 2 * len(widths) + children
    lines: list[Line] = []
    with bar(f"bench {NAME}", total, progress) as shown:

        def sensitivity() -> dict[str, list[float]]:
            found = sensitivities(judge, len(widths), shown.update)
            return {site: [float(loss) for loss in losses] for site, losses in found.items()}

        def on_child(best: float) -> None:
            shown.set_postfix_str(f"loss {best:.5f}")
            shown.update(1)

        losses = {site: np.asarray(values) for site, values in kept.get("sensitivity", sensitivity).items()}
        for index, bits in enumerate(widths):
            genes = models.uniform(index)
            line: Line = {"bits": bits, "budget": options.budget, "cost": costs.total(genes)}
            line["uniform"] = kept.get(f"uniform {bits}", partial(_both, judge, models, genes, accuracy))
            shown.update(2)
            if index + 1 < len(widths):
                rng = np.random.default_rng([options.config.seed, bits])

                def mixed(
                    budget: float = line["cost"], rng: np.random.Generator = rng, genes: Genes = genes
                ) -> dict[str, Any]:
                    starts = [allocate(losses, costs, budget), genes]
                    evolved = evolve_genes(
                        partial(loss_of_genes, judge),
                        starts,
                        costs,
                        budget,
                        rng,
                        options.generations,
                        options.children,
                        on_child,
                    )
                    found = _both(judge, models, evolved.genes, accuracy)
                    return {**found, "genes": evolved.genes, "start": evolved.losses[0]}

                line["mixed"] = kept.get(f"mixed {bits}", mixed)
                path = options.out / f"mixed-{bits}"
                if not path.exists():
                    save_model(path, models.model(line["mixed"]["genes"]))
            lines.append(line)
            _write(options.out, lines)
    return lines


def _both(
    judge: Evaluator, models: Widths, genes: Genes, accuracy: Callable[[QuantizedModel], float]
) -> dict[str, float]:
    return {"objective": loss_of_genes(judge, genes), "top1": accuracy(models.model(genes))}


def markdown(lines: list[Line]) -> str:
    """Formats the table as Markdown.

    Args:
        lines: The lines that `bench_precision` returns.

    Returns:
        The table.
    """
    rows = []
    title, unit = BUDGETS[lines[0]["budget"]]
    for line in lines:
        uniform, mixed = line["uniform"], line.get("mixed")
        rows.append(
            (
                f"{line['bits']} bits",
                f"{line['cost'] / unit:.2f}",
                f"{uniform['top1']:.1f}",
                f"{mixed['top1']:.1f}" if mixed else "",
                f"{uniform['objective']:.4f}",
                f"{mixed['objective']:.4f}" if mixed else "",
            )
        )
    return rows_of(("as uniform", title, *_COLUMNS), rows)


def _write(out: Path, lines: list[Line]) -> None:
    write_atomically(out / f"{NAME}.md", markdown(lines))
    write_atomically(out / f"{NAME}.json", json.dumps(lines, indent=1))
    _plot(out / f"{NAME}.png", lines)


def _plot(path: Path, lines: list[Line]) -> None:
    """Accuracy against the cost, as a PNG."""
    title, unit = BUDGETS[lines[0]["budget"]]
    with plotted(path, (6, 4)) as axes:
        for kind, mark in (("uniform", "o--"), ("mixed", "s-")):
            points = [(line["cost"] / unit, line[kind]["top1"]) for line in lines if kind in line]
            axes.plot(*zip(*points, strict=True), mark, label=kind)
        axes.set(xlabel=title, ylabel="top-1 %")
