"""What proposes steps for the candidates of all stages, in closed form and by gradients."""

from collections.abc import Callable, Sequence
from functools import partial

import jax.numpy as jnp
import numpy as np

from cptv_jax.config.schema import SearchConfig, effort, objectives
from cptv_jax.data import Images
from cptv_jax.pipeline.closed_form import steps_to_least_error, steps_to_least_output_error
from cptv_jax.pipeline.judging import _Judges, _teacher_stages, searched_space
from cptv_jax.pipeline.plan import Split
from cptv_jax.quantized.execution import Differentiable
from cptv_jax.quantized.model import Model, QuantizedModel
from cptv_jax.runtime.arithmetics import gradient_arithmetic
from cptv_jax.runtime.forward import array_of
from cptv_jax.search import (
    Descent,
    GradientProposer,
    MatchingLoss,
    channel_variances,
    paired,
)
from cptv_jax.search.loop import Opening
from cptv_jax.search.state import Scales

_VARIANCE_IMAGES = 100  # that the variances of the teacher's channels are taken from
_ROUNDING_IMAGES = 1000  # that roundings in closed form are fitted on, at most: a stage's inputs for all are in memory
_AT_ONCE = 25  # of them go through a stage


def _reader(batches: Sequence[Images]) -> tuple[Callable[[np.ndarray], np.ndarray], int]:
    """What reads images by their number, for the first stage, from batches of one size; and how many there are."""
    size = len(batches[0])

    def read(rows: np.ndarray) -> np.ndarray:
        return np.concatenate([batches[row // size].normalized(row % size, row % size + 1) for row in rows])

    return read, size * len(batches)


def _proposer(
    teacher: Model, base: QuantizedModel, split: Split, search: SearchConfig, judges: _Judges
) -> GradientProposer:
    mirrored = [batch.mirrored() for batch in split.calibration] if search.mirror else []
    read, count = _reader([*split.calibration, *mirrored])
    arithmetic = gradient_arithmetic(search.arithmetic)
    taught = _teacher_stages(teacher, base, search, approximate=arithmetic == "bf16-codes")
    few = read(np.arange(min(_VARIANCE_IMAGES, _reader(split.calibration)[1])))
    variances = channel_variances(taught, jnp.asarray(few), array_of) if search.gradient_matching else []
    students = base.stages(Differentiable(arithmetic), searched_space(base, search))
    return GradientProposer(
        paired(students, taught, array_of, variances),
        read,
        count,
        MatchingLoss(objectives(search).proposing, search.gradient_matching, len(variances)),
        Descent(
            search.gradient_steps, search.gradient_rate, search.gradient_batch, effort(search).passes, search.mixup
        ),
        search.images_at_once or max(1, judges.evaluator.images // 2),  # the derivative takes as much again
        judges.mesh,
    )


def _openings(
    base: QuantizedModel, split: Split, search: SearchConfig, on_work: Callable[[str], None]
) -> list[Opening]:
    """What is tried before the first gradient: grids of least error, then roundings that keep what layers give.

    on_work: told which layer is rounded.
    """

    def rounded_anew(scales: Scales) -> Scales:
        read, count = _reader(split.calibration)
        rows = np.arange(max(0, count - _ROUNDING_IMAGES), count)  # the last ones: others judge, where there are others
        batches = (jnp.asarray(read(rows[start : start + _AT_ONCE])) for start in range(0, len(rows), _AT_ONCE))
        return steps_to_least_output_error(base, scales, batches, lambda layer: on_work(f"rounding {layer}"))

    grids = partial(steps_to_least_error, base)
    return [grids, rounded_anew] if search.rounding else [grids]
