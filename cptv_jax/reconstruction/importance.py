"""How much each element of a stage's output matters to the model's predictions."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from cptv_jax.interpreters import Tensor
from cptv_jax.quantized.model import Model
from cptv_jax.runtime.forward import array_of, stage_inputs
from cptv_jax.runtime.stages import StageFunction


@partial(jax.jit, static_argnums=0)
def _pull_back(function: StageFunction, state: PyTree, x: Tensor, gradient: Array) -> Array:
    """Returns the gradient with respect to a stage's input values, from that with respect to its output values."""
    _, pullback = jax.vjp(lambda values: array_of(function(state, Tensor(values))), x.values)
    return pullback(gradient)[0]


def output_importance(teacher: Model, images: np.ndarray, chunk: int, key: Array) -> dict[str, Float[Array, "..."]]:
    """Computes the mean squared gradient of the teacher's loss with respect to each element of a stage's output.

    This is the diagonal of the Fisher information (BRECQ, Li et al. 2021, equation 10), averaged over images, with
    labels drawn from the teacher's own predictions, as in the true Fisher information.

    Args:
        teacher: The float model.
        images: Normalised images, [images, height, width, channels].
        chunk: How many images to compute at a time.
        key: Random key of the labels.

    Returns:
        The importance, scaled to mean 1, by stage name, without the last stage.
    """
    stages = teacher.stages()
    totals: dict[str, Array] = {}
    for number, start in enumerate(range(0, len(images), chunk)):
        inputs = stage_inputs(stages, Tensor(jnp.asarray(images[start : start + chunk])))
        logits = array_of(inputs[-1])
        labels = jax.random.categorical(jax.random.fold_in(key, number), logits)
        gradient = jax.nn.softmax(logits) - jax.nn.one_hot(labels, logits.shape[-1])
        for stage, previous, x in zip(stages[:0:-1], stages[-2::-1], inputs[-2:0:-1], strict=True):
            gradient = _pull_back(stage.function, stage.state, x, gradient)
            totals[previous.name] = totals.get(previous.name, 0.0) + jnp.sum(gradient**2, 0)
    return {name: jnp.where(jnp.mean(total) > 0, total / jnp.mean(total), 1.0) for name, total in totals.items()}
