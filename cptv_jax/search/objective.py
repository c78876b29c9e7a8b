"""Objectives: how far a quantized model's outputs are from the teacher's, one scalar per batch, lower is better."""

from collections.abc import Callable
from typing import Annotated, Literal

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float
from pydantic import AfterValidator, Field

from cptv_jax.errors import did_you_mean
from cptv_jax.options import options
from cptv_jax.runtime.stages import Output

Matrix = Float[Array, "batch dim"]
Compared = Literal["logits", "features", "both"]
_NORM_EPSILON = 1e-12  # smallest norm that a vector is divided by, as torch.nn.functional.normalize


def _normalized(x: Matrix) -> Matrix:
    return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), _NORM_EPSILON)


def info_nce(student: Matrix, teacher: Matrix, temperature: float) -> Float[Array, ""]:
    """Computes the contrastive loss: each student output must single out its own teacher output within the batch.

    Cross-entropy over cosine similarities / temperature, times 2 * temperature (CPT-V, equation 4; the factor is the
    published code's). The value depends on the batch, whose other images are the negatives.

    Args:
        student: Outputs [batch, dim] of the quantized model.
        teacher: Outputs [batch, dim] of the teacher for the same images.
        temperature: Divides the similarities.

    Returns:
        The loss [], mean over the batch.
    """
    similarity = jnp.matmul(_normalized(student), _normalized(teacher).T, precision=jax.lax.Precision.HIGHEST)
    own = jnp.arange(student.shape[0])
    losses = optax.softmax_cross_entropy_with_integer_labels(similarity / temperature, own)
    return jnp.mean(losses) * (2 * temperature)


def mean_squared_error(student: Matrix, teacher: Matrix, temperature: float) -> Float[Array, ""]:
    """Computes the mean of squared differences over all elements.

    Args:
        student: Outputs [batch, dim] of the quantized model.
        teacher: Outputs [batch, dim] of the teacher for the same images.
        temperature: Has no effect.

    Returns:
        The loss [].
    """
    return jnp.mean((student - teacher) ** 2)


def kl_divergence(student: Matrix, teacher: Matrix, temperature: float) -> Float[Array, ""]:
    """Computes KL(teacher || student) of softmaxes over the last axis, mean over the batch.

    Args:
        student: Logits [batch, dim] of the quantized model.
        teacher: Logits [batch, dim] of the teacher for the same images.
        temperature: Divides the logits.

    Returns:
        The loss [].
    """
    log_student = jax.nn.log_softmax(student / temperature, -1)
    log_teacher = jax.nn.log_softmax(teacher / temperature, -1)
    return jnp.mean(jnp.sum(jnp.exp(log_teacher) * (log_teacher - log_student), -1))


def cosine_distance(student: Matrix, teacher: Matrix, temperature: float) -> Float[Array, ""]:
    """Computes one minus the cosine similarity, mean over the batch.

    Args:
        student: Outputs [batch, dim] of the quantized model.
        teacher: Outputs [batch, dim] of the teacher for the same images.
        temperature: Has no effect.

    Returns:
        The loss [].
    """
    return 1.0 - jnp.mean(jnp.sum(_normalized(student) * _normalized(teacher), -1))


OBJECTIVES: dict[str, Callable[[Matrix, Matrix, float], Float[Array, ""]]] = {
    "infonce": info_nce,
    "mse": mean_squared_error,
    "kl": kl_divergence,
    "cosine": cosine_distance,
}
# Where none is given: the published one, and that of the class probabilities.
TEMPERATURES = {"infonce": 3.0, "kl": 1.0}


def _known(name: str) -> str:
    for part in name.split("+"):
        if part not in OBJECTIVES:
            raise ValueError(f"is '{name}'{did_you_mean(part, OBJECTIVES)}")
    return name


ObjectiveName = Annotated[str, AfterValidator(_known)]
"""A key of OBJECTIVES, or several joined by +, whose losses are added."""


@options
class Objective:
    """Loss of a batch of outputs against the teacher's.

    Example:
        >>> objective = Objective("kl+cosine", on="logits", temperature=2.0)
        >>> loss = objective(student_output, teacher_output)
    """

    name: ObjectiveName = "infonce"
    """A key of OBJECTIVES, or several joined by +, whose losses are added."""
    on: Compared = "logits"
    """Outputs to compare; both adds the losses of logits and features."""
    temperature: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """Temperature of infonce and kl; null means the default of each, 3 and 1."""

    @property
    def names(self) -> tuple[str, ...]:
        """The keys of OBJECTIVES whose losses are added."""
        return tuple(self.name.split("+"))

    def _temperature(self, name: str) -> float:
        return TEMPERATURES.get(name, 1.0) if self.temperature is None else self.temperature

    def __call__(self, student: Output, teacher: Output) -> Float[Array, ""]:
        """Computes the loss.

        Args:
            student: Outputs of the model that is judged.
            teacher: Outputs of the teacher for the same images.

        Returns:
            The loss; a NaN (an overflown candidate) counts as infinitely bad.
        """
        outputs = ("logits", "features") if self.on == "both" else (self.on,)
        losses = [
            OBJECTIVES[name](getattr(student, output), getattr(teacher, output), self._temperature(name))
            for name in self.names
            for output in outputs
        ]
        loss = sum(losses[1:], losses[0])
        return jnp.where(jnp.isnan(loss), jnp.inf, loss)
