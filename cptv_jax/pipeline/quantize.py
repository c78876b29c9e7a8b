"""quantize(): from a float model and unlabelled images to a quantized model, a run that can be interrupted."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cptv_jax.config.schema import QuantizeConfig, to_mapping
from cptv_jax.data import Images
from cptv_jax.evaluation import check_labels, evaluate
from cptv_jax.pipeline.outcome import Quantization
from cptv_jax.pipeline.plan import Plan, check_size, planned
from cptv_jax.pipeline.search_phase import improve
from cptv_jax.progress import bar, counter
from cptv_jax.quantized.model import Model, QuantizedModel
from cptv_jax.reconstruction.blocks import reconstruct
from cptv_jax.storage.files import digest, lock
from cptv_jax.storage.run_directory import RunDirectory


def base_model(model: Model, plan: Plan, on_progress: Callable[[int, int], None]) -> QuantizedModel:
    """What the planned base method makes of a float model, before any reconstruction of its blocks."""
    config, method = plan.config, plan.method
    batches = [jnp.asarray(batch.normalized(0, len(batch))) for batch in plan.split.calibration]
    options = {} if method.options is None else {"options": getattr(config, method.options)}
    return method.quantize(model, batches, plan.recipe, _base_key(config), on_progress, **options)


def _base_key(config: QuantizeConfig) -> jax.Array:
    return jax.random.fold_in(jax.random.key(config.seed), 0)


def _make_base(model: Model, plan: Plan, run: RunDirectory | None, progress: bool) -> QuantizedModel:
    """The base method's model, its blocks reconstructed where that is asked for."""
    config, split = plan.config, plan.split
    resumed = run.reconstruction() if run else None
    done, base = resumed or (0, None)
    if base is None:
        with bar(f"calibrate ({config.method})", len(split.calibration), progress) as shown:
            base = base_model(model, plan, counter(shown))
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
            model,
            base,
            images,
            config.reconstruction,
            jax.random.fold_in(_base_key(config), 1),
            counter(shown),
            on_stage,
            done,
        )


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
    with lock(Path(out)):
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
            final, state = improve(model, base, split, config, run, progress)
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
