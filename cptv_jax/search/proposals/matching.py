"""A student paired with its teacher, stage by stage: gradients follow more than the last output."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, PyTree

from cptv_jax.runtime.forward import stage_inputs
from cptv_jax.runtime.stages import Stage, StageFunction

TEACHER = "teacher"  # name of the teacher's activations: a backward pass keeps them instead of computing them again
_SMALLEST_VARIANCE = 1e-6

Values = Callable[[PyTree], Float[Array, "images ..."]]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Pair:
    """Outputs of the same stage of both models for the same images, and the error of the student's so far.

    Attributes:
        student: The student's output.
        teacher: The teacher's output.
        error: Sum [images] of relative_errors over the compared stages up to here.
    """

    student: PyTree
    teacher: PyTree
    error: Float[Array, " images"]


def relative_errors(
    student: Float[Array, "images ... channels"],
    teacher: Float[Array, "images ... channels"],
    variance: Float[Array, " channels"],
) -> Float[Array, " images"]:
    """Computes the mean squared error of each image, relative to the teacher's variance in each channel.

    A transformer's residual stream has a few channels hundreds of times as large as others; without the variances these
    alone would be matched.

    Args:
        student: Values [images, ..., channels] of the student.
        teacher: Values [images, ..., channels] of the teacher.
        variance: Variance [channels] of the teacher's values.

    Returns:
        Errors [images].
    """
    error = (student - teacher) ** 2 / (variance + _SMALLEST_VARIANCE)
    return jnp.mean(error.reshape(error.shape[0], -1), -1)


def channel_variances(stages: Sequence[Stage], x: PyTree, values: Values) -> list[Float[Array, " channels"]]:
    """Computes the variance of each channel of every stage's output, over images and tokens.

    Args:
        stages: The stages of a model.
        x: The first stage's input.
        values: Extracts the array to compare from an output.

    Returns:
        Variances [channels] for every stage but the last.
    """
    outputs = (values(x) for x in stage_inputs(stages, x)[1:-1])
    return [jnp.var(output.reshape(-1, output.shape[-1]), 0) for output in outputs]


@dataclass(frozen=True)
class PairFunction:
    """Computes a stage of both models.

    The state has "student" and "teacher", and "variance" by the teacher's channels; the first stage's input is images,
    that of the others a Pair.

    Attributes:
        student: The student's function.
        teacher: The teacher's function.
        values: Extracts the array to compare from a stage's output; None leaves this stage out.
    """

    student: StageFunction
    teacher: StageFunction
    values: Values | None

    def __call__(self, state: PyTree, x: Any) -> Pair:
        """Computes the stage for both models.

        Args:
            state: The state of the pair.
            x: Images at the first stage, else the Pair of the stage before.

        Returns:
            The outputs, and the error so far.
        """
        before = x if isinstance(x, Pair) else Pair(x, x, jnp.zeros(x.shape[0]))
        target = jax.lax.stop_gradient(self.teacher(state["teacher"], before.teacher))
        target = checkpoint_name(target, TEACHER)
        output = self.student(state["student"], before.student)
        if self.values is None:
            return Pair(output, target, before.error)
        errors = relative_errors(self.values(output), self.values(target), state["variance"])
        return Pair(output, target, before.error + errors)


@dataclass(frozen=True)
class PairBinding:
    """Places a candidate in the student's part of a pair's state.

    Attributes:
        bind: The student's own `bind`.
    """

    bind: Callable[[PyTree, PyTree], PyTree]

    def __call__(self, state: PyTree, candidate: PyTree) -> PyTree:
        """Places a candidate.

        Args:
            state: The state of the pair.
            candidate: The student's candidate.

        Returns:
            The state with the candidate in it.
        """
        return {**state, "student": self.bind(state["student"], candidate)}


def paired(
    students: Sequence[Stage],
    teachers: Sequence[Stage],
    values: Values,
    variances: Sequence[Float[Array, " channels"]],
) -> list[Stage]:
    """Joins the stages of a student and its teacher into those of one model, whose candidates are the student's.

    Args:
        students: The student's stages.
        teachers: The teacher's stages.
        values: Extracts the array to compare from the output of any stage but the last.
        variances: See `channel_variances`; stages without one, such as the last, are not compared.

    Returns:
        The stages of the pair.
    """
    return [
        replace(
            student,
            function=PairFunction(student.function, teacher.function, values if index < len(variances) else None),
            state={"student": student.state, "teacher": teacher.state}
            | ({"variance": variances[index]} if index < len(variances) else {}),
            bind=PairBinding(student.bind),
        )
        for index, (student, teacher) in enumerate(zip(students, teachers, strict=True))
    ]


@dataclass(frozen=True)
class MatchingLoss:
    """Loss of a pair's last outputs, plus `weight` times the mean error of the compared stages.

    Attributes:
        objective: objective(student, teacher) of a batch.
        weight: Weight of the mean error.
        stages: How many stages are compared; 0 leaves only the objective.
    """

    objective: Callable[[PyTree, PyTree], Array]
    weight: float
    stages: int

    def __call__(self, pair: Pair) -> Float[Array, ""]:
        """Computes the loss of a batch.

        Args:
            pair: The outputs of the last stage, and the error of the stages before.

        Returns:
            The loss [].
        """
        loss = self.objective(pair.student, pair.teacher)
        return loss + self.weight * jnp.mean(pair.error) / self.stages if self.stages else loss
