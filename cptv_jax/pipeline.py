"""quantize(): from a float model and unlabelled images to a quantized model, a run that can be interrupted."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cptv_jax.checkpoint import save_model
from cptv_jax.config import QuantizeConfig, SearchConfig, to_mapping
from cptv_jax.data import Images
from cptv_jax.evaluation import Accuracy, check_labels, evaluate
from cptv_jax.forward import activation_bytes, outputs
from cptv_jax.mesh import make_mesh, pieces_at_once
from cptv_jax.methods.reconstruction import reconstruct
from cptv_jax.plan import Plan, Split, check_size, planned, searched_sites
from cptv_jax.progress import bar, counter
from cptv_jax.quantized import Model, QuantizedModel
from cptv_jax.recipe import Recipe
from cptv_jax.run_directory import RunDirectory, claimed, digest
from cptv_jax.search import Evaluator, EvolQ, Generational, Objective, RacingEvaluator, Strategy
from cptv_jax.search.run import SearchState, initial_state, run_search
from cptv_jax.search.strategies.evol_q import published_step
from cptv_jax.stages import Output, Stage

_GIB = 2**30


@dataclass(frozen=True)
class Quantization:
    """The outcome of `quantize`.

    model: the quantized model after the search; base: before it; teacher: the float model. log: the search's records.
    results: accuracies (percent) and losses by name, as they were measured.
    """

    model: QuantizedModel
    base: QuantizedModel
    teacher: Model
    config: QuantizeConfig
    log: tuple[dict[str, Any], ...] = ()
    results: dict[str, Any] = field(default_factory=dict)

    def evaluate(self, images: Images, progress: bool = False) -> Accuracy:
        """Accuracy of the quantized model on labelled images."""
        return evaluate(self.model.stages(), images, progress)

    def save(self, path: str | Path) -> None:
        """Writes the quantized model as a checkpoint directory. Raises InputError when the path exists."""
        save_model(Path(path), self.model)

    def report(self, path: str | Path) -> Path:
        """Writes report.md and loss.png into a directory and returns the path of the former."""
        from cptv_jax.report import write_report  # matplotlib takes a second to import

        return write_report(Path(path), self)


def strategy_for(config: SearchConfig, weight_bits: int) -> Strategy:
    """The configured strategy for a stage whose searched weights have this width."""
    if config.strategy == "evol-q":
        step = published_step(weight_bits) if config.step is None else config.step
        return EvolQ(step, config.population, config.samples, config.rounds)
    return Generational(config.sigma, config.children, config.survivors, config.rounds)


def _stage_bits(recipe: Recipe, stage: str, searched: Sequence[str]) -> int:
    """Width of a stage's searched sites; the last one's where they differ (the published code asks proj)."""
    return [spec.bits for site, spec in recipe.of_stage(stage).items() if f"{stage}.{site}" in searched][-1]


def _outputs(
    stages: Sequence[Stage], batches: Sequence[Images], search: SearchConfig, progress: bool, label: str
) -> list[Output]:
    """The output for each batch, in float32 on the host."""
    with bar(label, sum(len(batch) for batch in batches), progress) as shown:
        return [
            outputs(stages, batch.normalized, len(batch), budget=_budget(search), on_progress=shown.update)
            for batch in batches
        ]


def _budget(search: SearchConfig) -> float | None:
    return None if search.memory_gib is None else search.memory_gib * _GIB


def _make_evaluators(
    teacher: Model, base: QuantizedModel, split: Split, config: QuantizeConfig, progress: bool
) -> tuple[Evaluator, Any]:
    search = config.search
    sites = searched_sites(base.recipe, search)
    stages = base.stages(lambda site: site in sites, arithmetic=search.arithmetic)
    reference = base.stages(rounding=False) if search.teacher == "published" else teacher.stages()
    objective = Objective(search.objective, search.on, search.temperature)
    searched = split.calibration[: split.searched]
    targets = _outputs(reference, [*searched, *split.held_out], search, progress, "teacher outputs")
    loss_of = jax.jit(objective)

    def held_out_loss(current: Sequence[Stage]) -> float:
        found = _outputs(current, split.held_out, search, False, "held-out images")
        pairs = zip(found, targets[len(searched) :], strict=True)
        return float(np.mean([float(loss_of(output, target)) for output, target in pairs]))

    mesh = make_mesh(search.population_devices)
    images, width = pieces_at_once(
        mesh,
        activation_bytes(stages, jax.ShapeDtypeStruct((1, *searched[0].pixels.shape[1:]), jnp.float32)),
        config.calibration.batch * len(searched),
        search.children if search.strategy == "generational" else 1,
        _budget(search),
    )
    evaluator = (RacingEvaluator if search.race else Evaluator)(
        stages,
        [batch.normalized(0, len(batch)) for batch in searched],
        targets[: len(searched)],
        objective,
        search.images_at_once or images,
        search.candidates_at_once or width,
        mesh,
        cache_bytes=search.cache_gib * _GIB,
    )
    return evaluator, held_out_loss if split.held_out else None


def _make_base(model: Model, plan: Plan, run: RunDirectory | None, progress: bool) -> QuantizedModel:
    """The base method's model, its blocks reconstructed where that is asked for."""
    config, method, recipe, split = plan.config, plan.method, plan.recipe, plan.split
    key = jax.random.fold_in(jax.random.key(config.seed), 0)
    resumed = run.reconstruction() if run else None
    done, base = resumed or (0, None)
    if base is None:
        batches = [jnp.asarray(batch.normalized(0, len(batch))) for batch in split.calibration]
        options = {} if method.options is None else {"options": getattr(config, method.options)}
        with bar(f"calibrate ({config.method})", len(batches), progress) as shown:
            base = method.quantize(model, batches, recipe, key, counter(shown), **options)
        del batches
    if config.reconstruction.steps == 0:
        return base
    if run and resumed is None:
        run.save_reconstruction(0, base)
    images = np.concatenate([batch.normalized(0, len(batch)) for batch in split.calibration])
    with bar("reconstruct", 1, progress) as shown:

        def on_stage(index: int, so_far: QuantizedModel, before: float, after: float) -> None:
            shown.set_postfix_str(f"relative error {before:.4f} -> {after:.4f}")
            if run:
                run.save_reconstruction(index + 1, so_far)

        return reconstruct(
            model, base, images, config.reconstruction, jax.random.fold_in(key, 1), counter(shown), on_stage, done
        )


def _search(
    teacher: Model,
    base: QuantizedModel,
    split: Split,
    config: QuantizeConfig,
    run: RunDirectory | None,
    progress: bool,
) -> tuple[QuantizedModel, SearchState]:
    evaluator, held_out_loss = _make_evaluators(teacher, base, split, config, progress)
    state = (run.state() if run else None) or initial_state(evaluator)
    searched = [f"{name}.{site}" for name, scales in state.scales.items() for site in scales]
    strategies = {name: strategy_for(config.search, _stage_bits(base.recipe, name, searched)) for name in state.scales}
    per_round = config.search.children if config.search.strategy == "generational" else 1
    per_pass = len(strategies) * config.search.rounds * per_round
    with bar("search", config.search.passes * per_pass, progress, max(0, state.evaluations - 1)) as shown:
        evaluator.on_refresh = lambda done, total: shown.set_postfix_str(f"stage inputs, batch {done} of {total}")

        def on_round(stage: str, evaluated: int, best: float) -> None:
            shown.set_postfix_str(f"{stage} loss {best:.5f}")
            shown.update(evaluated)

        state = run_search(
            evaluator,
            lambda name: strategies[name],
            config.search.passes,
            jax.random.key(config.seed),
            state,
            held_out_loss,
            on_round,
            run.save_state if run else lambda state: None,
        )
    scales = {f"{name}.{site}": scale for name, sites in state.best_scales.items() for site, scale in sites.items()}
    return base.with_scales(scales), state


def quantize(
    model: Model,
    images: Images,
    config: QuantizeConfig = QuantizeConfig(),  # noqa: B008 - frozen
    *,
    out: str | Path | None = None,
    evaluation: Images | None = None,
    progress: bool = False,
    on_phase: Callable[[str], None] = lambda name: None,
) -> Quantization:
    """Quantizes a float model with a base method and improves it by a search over its scales.

    images: calibration images; labels are ignored. evaluation: labelled images; they are only ever evaluated on, after
    the search is over. out: a run directory; the same call with the same `out` continues an interrupted run, and ends
    with the same bits as an uninterrupted one. Raises InputError for settings or images that cannot work, and for an
    `out` that holds something else or that another process is working in. on_phase is called with "base", "search"
    and "evaluation" as these begin; one that is done already, or not asked for, is passed over.
    """
    images = images.without_labels()
    plan = planned(model, images, config)  # bad input is refused before anything is written
    config = plan.config
    if evaluation is not None:
        check_size(model, evaluation)
        check_labels(model.stages(), evaluation)
    if out is None:
        return _continue(model, plan, None, evaluation, progress, on_phase)
    identity = {
        "config": to_mapping(config),
        "architecture": model.architecture.name,
        "weights": digest(model.weights),
        "images": digest(images.pixels),
    }
    with claimed(Path(out)):
        run = RunDirectory(Path(out), identity)
        return _continue(model, plan, run, evaluation, progress, on_phase)


def _continue(
    model: Model,
    plan: Plan,
    run: RunDirectory | None,
    evaluation: Images | None,
    progress: bool,
    on_phase: Callable[[str], None],
) -> Quantization:
    """Whatever of a run is still to be done."""
    config, split = plan.config, plan.split
    base = run.base() if run else None
    if base is None:
        on_phase("base")
        base = _make_base(model, plan, run, progress)
        if run:
            run.save_base(base)
            run.drop_reconstruction()
    final = run.final() if run else None
    state = run.state() if run else None
    if final is None:
        if config.search.strategy == "none":
            final = base
        else:
            on_phase("search")
            final, state = _search(model, base, split, config, run, progress)
        if run:
            run.save_final(final)

    results: dict[str, Any] = run.results() if run else {}
    on_phase("evaluation")
    if evaluation is not None:
        evaluated = digest([evaluation.pixels, evaluation.require_labels()])
        if results.get("images") != evaluated:  # accuracies of other images are none of these
            results = {"images": evaluated}
        for name, stages in (("float", model.stages()), ("base", base.stages()), ("final", final.stages())):
            if name in results:
                continue
            if name == "final" and final is base:
                results[name] = results["base"]
            else:
                results[name] = vars(evaluate(stages, evaluation, progress, f"evaluate {name}"))
            if run:
                run.save_results(results)
    accuracies = {name: result for name, result in results.items() if name != "images"}
    outcome = Quantization(final, base, model, config, state.log if state else (), accuracies)
    if run:
        outcome.report(run.path)
    return outcome
