"""quantize(): from a float model and unlabelled images to a quantized model, a run that can be interrupted."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from cptv_jax.config.schema import QuantizeConfig
from cptv_jax.data import Images
from cptv_jax.errors import InputError
from cptv_jax.evaluation import Accuracy, check_labels, check_unseen, evaluate
from cptv_jax.options import to_mapping
from cptv_jax.pipeline.outcome import Quantization
from cptv_jax.pipeline.plan import Plan, check_size, make_plan
from cptv_jax.pipeline.search_phase import improve
from cptv_jax.progress import bar, counter
from cptv_jax.quantized.model import Model, QuantizedModel
from cptv_jax.reconstruction.blocks import reconstruct
from cptv_jax.storage.files import digest, lock
from cptv_jax.storage.run_directory import RunDirectory


def _make_base(model: Model, plan: Plan, run: RunDirectory | None, progress: bool) -> QuantizedModel:
    """The base method's model, its blocks reconstructed where that is asked for."""
    split = plan.split
    resumed = run.reconstruction() if run else None
    done, base = resumed or (0, None)
    if base is None:
        with bar(f"calibrate ({plan.method.name})", len(split.calibration), progress) as shown:
            base = plan.base_model(model, counter(shown))
    if plan.reconstruction.steps == 0:
        return base
    if run and resumed is None:
        run.save_reconstruction(0, base)
    images = np.concatenate([batch.normalize(0, len(batch)) for batch in split.calibration])
    with bar("reconstruct", 1, progress) as shown:

        def on_stage(index: int, so_far: QuantizedModel, before: float, after: float) -> None:
            shown.set_postfix_str(f"relative error {before:.4f} -> {after:.4f}")
            if run:
                run.save_reconstruction(index + 1, so_far)

        return reconstruct(
            model,
            base,
            images,
            plan.reconstruction,
            jax.random.fold_in(plan.key, 1),
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

    Args:
        model: The float model.
        images: Calibration images; labels are ignored.
        config: The configuration.
        out: A run directory; the same call with the same `out` continues an interrupted run, and ends with the same
            bits as an uninterrupted one.
        evaluation: Labelled images, none of which calibrates; they are only evaluated on, after the search is over.
        progress: Whether to show bars.
        on_phase: Called with "base", "search" and "evaluation" as these begin; a phase that is already done or not
            requested is skipped.

    Returns:
        The quantized model, with the base model, the log and the accuracies.

    Raises:
        InputError: If settings or images cannot work, or if `out` holds something else or another process works in it.

    Example:
        >>> config = QuantizeConfig(method=ErqOptions(), search=SearchConfig(strategy=Guided()))
        >>> outcome = quantize(model, images, config)
        >>> outcome.save("quantized")
    """
    if not isinstance(config, QuantizeConfig):
        raise InputError(f"config is a {type(config).__name__}; give a QuantizeConfig, such as load_config(path) makes")
    if not isinstance(images, Images):
        raise InputError(f"images is a {type(images).__name__}; give Images, such as load_images or images_from_arrays")
    images = images.without_labels()
    plan = make_plan(model, images, config)  # bad input is refused before anything is written
    if evaluation is not None:
        check_size(model, evaluation)
        check_labels(model.stages(), evaluation)
        check_unseen(evaluation, images)
    if out is None:
        return _continue(model, plan, None, evaluation, progress, on_phase)
    identity = {
        "config": to_mapping(plan.config),
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
    """Does the remaining parts of a run."""
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
        if plan.search is None:
            final = base
        else:
            on_phase("search")
            final, state = improve(model, base, plan.split, plan.search, run, progress)
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
    accuracies = {name: Accuracy(**result) for name, result in results.items() if name != "images"}
    outcome = Quantization(final, base, model, plan.config, state.log if state else (), accuracies, plan.notes)
    if run:
        outcome.report(run.path)
    return outcome
