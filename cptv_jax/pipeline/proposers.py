"""The proposers of a search, which propose steps for all stages: closed forms and gradients."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np

from cptv_jax.data import Images
from cptv_jax.pipeline.closed_form import steps_to_least_error, steps_to_least_output_error
from cptv_jax.pipeline.judging import teacher_stages
from cptv_jax.pipeline.plan import SearchPlan, Split
from cptv_jax.quantized.execution import Differentiable
from cptv_jax.quantized.model import Model, QuantizedModel
from cptv_jax.runtime.arithmetics import gradient_arithmetic
from cptv_jax.runtime.forward import array_of
from cptv_jax.search import (
    ClosedForms,
    Descent,
    Evaluator,
    GradientProposer,
    Gradients,
    MatchingLoss,
    Proposal,
    Proposer,
    channel_variances,
    paired,
)
from cptv_jax.search.proposals.base import Listener, Progress, Scales

_VARIANCE_IMAGES = 100  # that the variances of the teacher's channels are taken from
_ROUNDING_IMAGES = 1000  # that roundings in closed form are fitted on, at most: a stage's inputs for all are in memory
_AT_ONCE = 25  # of them go through a stage


def _reader(batches: Sequence[Images]) -> tuple[Callable[[np.ndarray], np.ndarray], int]:
    """Makes a function that reads images by number, for the first stage, from batches of one size; and counts them."""
    size = len(batches[0])

    def read(rows: np.ndarray) -> np.ndarray:
        return np.concatenate([batches[row // size].normalize(row % size, row % size + 1) for row in rows])

    return read, size * len(batches)


@dataclass(frozen=True)
class LeastError:
    """Proposes grids of weights with least squared error (see steps_to_least_error).

    Attributes:
        base: The quantized model.
    """

    base: QuantizedModel
    every_pass = False
    steps = 0

    def propose(
        self,
        scales: Scales,
        pass_index: int,
        key: jax.Array,
        progress: Progress | None = None,
        listener: Listener = Listener(),  # noqa: B008 - immutable
    ) -> Proposal:
        """Proposes steps to grids of least squared error.

        Args:
            scales: The present candidates, by stage.
            pass_index: Has no effect.
            key: Has no effect.
            progress: Has no effect.
            listener: Told of the beginning.

        Returns:
            The steps.
        """
        listener.on_step("grids of weights", 0)
        return Proposal(steps_to_least_error(self.base, scales))


@dataclass(frozen=True)
class LeastOutputError:
    """Proposes roundings and factors that keep the outputs of layers (see steps_to_least_output_error).

    Attributes:
        base: The quantized model.
        batches: Calibration images.
    """

    base: QuantizedModel
    batches: Sequence[Images]
    every_pass = False
    steps = 0

    def propose(
        self,
        scales: Scales,
        pass_index: int,
        key: jax.Array,
        progress: Progress | None = None,
        listener: Listener = Listener(),  # noqa: B008 - immutable
    ) -> Proposal:
        """Proposes steps to roundings and factors.

        Args:
            scales: The present candidates, by stage.
            pass_index: Has no effect.
            key: Has no effect.
            progress: Has no effect.
            listener: Told the name of each layer.

        Returns:
            The steps.
        """
        read, count = _reader(self.batches)
        rows = np.arange(max(0, count - _ROUNDING_IMAGES), count)  # the last ones: others judge, where there are others
        batches = (jnp.asarray(read(rows[start : start + _AT_ONCE])) for start in range(0, len(rows), _AT_ONCE))
        found = steps_to_least_output_error(
            self.base, scales, batches, lambda layer: listener.on_step(f"rounding {layer}", 0)
        )
        return Proposal(found)


def _gradient_proposer(
    asked: Gradients, teacher: Model, base: QuantizedModel, split: Split, search: SearchPlan, evaluator: Evaluator
) -> GradientProposer:
    mirrored = [batch.mirror() for batch in split.calibration] if asked.mirror else []
    read, count = _reader([*split.calibration, *mirrored])
    arithmetic = gradient_arithmetic(search.compute.arithmetic)
    taught = teacher_stages(teacher, base, search, approximate=arithmetic == "bf16-codes")
    few = read(np.arange(min(_VARIANCE_IMAGES, _reader(split.calibration)[1])))
    variances = channel_variances(taught, jnp.asarray(few), array_of) if asked.matching else []
    students = base.stages(Differentiable(arithmetic), search.space)
    objective = replace(search.objective, name=asked.objective)
    return GradientProposer(
        paired(students, taught, array_of, variances),
        read,
        count,
        MatchingLoss(objective, asked.matching, len(variances)),
        Descent(asked.steps, asked.rate, asked.batch, search.strategy.passes, asked.mixup),
        search.compute.images_at_once or max(1, evaluator.images // 2),  # the derivative takes as much again
        evaluator.mesh,
    )


def make_proposers(
    teacher: Model, base: QuantizedModel, split: Split, search: SearchPlan, evaluator: Evaluator
) -> list[Proposer]:
    """Builds the proposers that a strategy asks for.

    Args:
        teacher: The float model.
        base: The quantized model.
        split: The images.
        search: The plan of the search.
        evaluator: The evaluator, whose mesh and number of images at once the gradients share.

    Returns:
        The proposers, in the order of their turns.
    """
    found: list[Proposer] = []
    for asked in search.strategy.proposers():
        if isinstance(asked, ClosedForms):
            found.append(LeastError(base))
            if search.space.rounding:
                found.append(LeastOutputError(base, split.calibration))
        else:
            found.append(_gradient_proposer(asked, teacher, base, split, search, evaluator))
    return found
