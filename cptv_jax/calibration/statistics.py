"""Calibration shared by the methods that fit every quantizer from statistics of a float forward pass."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from jaxtyping import Array, Float, PyTree

from cptv_jax.calibration import observers
from cptv_jax.calibration.observers import Range
from cptv_jax.errors import InputError
from cptv_jax.interpreters import Observing, Tensor
from cptv_jax.models.walk import Run, walk
from cptv_jax.quantized.model import Model
from cptv_jax.quantizers import Quantizer
from cptv_jax.recipe.sites import full_name
from cptv_jax.recipe.spec import Recipe


@dataclass(frozen=True)
class _Observe:
    """Visits a stage with the interpreter Observing. Its arrays are specifications and ranges so far, by site."""

    fit: bool
    log_int_softmax: bool

    def __call__(self, run: Run, x: PyTree, arrays: PyTree) -> tuple[PyTree, PyTree]:
        specs, ranges = arrays
        ops = Observing(observers, specs, ranges, fit=self.fit, log_int_softmax=self.log_int_softmax)
        output = run(ops, x)
        return output, (ops.ranges, ops.fitted)


def calibrate(
    model: Model,
    batches: Sequence[Float[Array, "_batch height width channels"]],
    recipe: Recipe,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Quantizer]:
    """Fits a quantizer for every site of a recipe, in a float forward pass over calibration images.

    Ranges come from all batches; scores (OMSE, power-of-two factor) come from the last one alone, as in FQ-ViT and
    Evol-Q. One batch and one stage are in memory at a time.

    Args:
        model: The float model.
        batches: Normalised calibration images.
        recipe: What is quantized, and how.
        on_progress: Called as on_progress(done, total) after every stage.

    Returns:
        The quantizers by site, in the recipe's order.

    Raises:
        InputError: An observer keeps no statistic, or no fit makes a quantizer from one.
    """
    for name, spec in recipe.sites.items():
        if spec.observer not in observers.STATISTICS or spec.quantizer not in observers.FITS:
            raise InputError(
                f"{name}: the observer {spec.observer} cannot set a {spec.quantizer} quantizer here; set observer "
                f"to {' or '.join(observers.STATISTICS)} and quantizer to {' or '.join(observers.FITS)}"
            )
    stages = model.architecture.stage_names
    specs = {stage: recipe.of_stage(stage) for stage in stages}
    ranges: dict[str, dict[str, Range]] = {stage: {} for stage in stages}
    quantizers: dict[str, Quantizer] = {}
    for index, batch in enumerate(batches):
        visit = _Observe(fit=index == len(batches) - 1, log_int_softmax=recipe.log_int_softmax)
        arrays = {stage: (specs[stage], ranges[stage]) for stage in stages}
        passed = walk(model.architecture, model.weights, Tensor(batch), dict.fromkeys(stages, visit), arrays)
        for done, (stage, _, found) in enumerate(passed, 1):
            ranges[stage], fitted = found
            quantizers.update({full_name(stage, site): quantizer for site, quantizer in fitted.items()})
            on_progress(index * len(stages) + done, len(batches) * len(stages))
    return {site: quantizers[site] for site in recipe.sites}
