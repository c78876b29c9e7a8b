"""Weight quantization that makes up for its own error: rounding refined by halves, the rest adjusted by ridge; or
one input after the other, the rest adjusted each time."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from cptv_jax.quantizers import DualUniform, OffsetUniform

_SMALLEST_HALF = 32  # smaller ones are padded to it, so that one program serves them all
_BLOCK = 64  # inputs


def ridge(
    gram: Float[np.ndarray, "inputs inputs"], cross: Float[np.ndarray, "inputs outputs"], penalty: float
) -> Float[np.ndarray, "inputs outputs"]:
    """(gram + penalty I)^-1 cross, in float64 on the host: a Gram matrix of few rows is all but singular."""
    regular = np.asarray(gram, np.float64) + penalty * np.eye(len(gram))
    return np.linalg.solve(regular, np.asarray(cross, np.float64))


@jax.jit
def refine_rounding(
    errors: Float[Array, "outputs inputs"],
    down: Float[Array, "outputs inputs"],
    up: Float[Array, "outputs inputs"],
    moment: Float[Array, "inputs inputs"],
    flips: Int[Array, ""] | int,
) -> Float[Array, "outputs inputs"]:
    """Rounding errors e of each output channel with a smaller e^T E e (ERQ, "Rounding Refinement").

    errors: quantized minus original weight; down, up: what they would be after rounding down or up.
    moment: E, the mean of x x^T over what the weights are multiplied with, nearly.
    flips: so many times the rounding with the steepest gradient, among those that a step against the gradient would
        shrink, is reconsidered; it is kept unless the objective rises.
    """
    rows = jnp.arange(len(errors))

    def step(state: tuple[Array, Array, Array, Array]) -> tuple[Array, Array, Array, Array]:
        count, errors, gradient, _ = state
        steepness = jnp.where(errors * gradient > 0, jnp.abs(gradient), 0.0)
        index = jnp.argmax(steepness, 1)
        old, slope = errors[rows, index], gradient[rows, index]
        target = old - jnp.where(steepness[rows, index] > 0, slope, 0.0)
        above, below = up[rows, index], down[rows, index]
        new = jnp.where(jnp.abs(target - above) <= jnp.abs(target - below), above, below)
        # e^T E e changes by this when one entry of e does; no need to compute it anew.
        rise = (new - old) * slope + (new - old) ** 2 * moment[index, index]
        change = jnp.where(rise > 0, 0.0, new - old)
        errors = errors.at[rows, index].add(change)
        gradient = gradient + 2 * change[:, None] * moment[index]
        return count + 1, errors, gradient, jnp.any(change != 0)

    def is_unfinished(state: tuple[Array, Array, Array, Array]) -> Array:
        return (state[0] < flips) & state[3]

    gradient = 2 * jnp.matmul(errors, moment, precision=jax.lax.Precision.HIGHEST)
    start = (jnp.int32(0), errors, gradient, jnp.bool_(True))
    return jax.lax.while_loop(is_unfinished, step, start)[1]


@jax.jit
def _errors(quantizer: OffsetUniform | DualUniform, kernel: Float[Array, "inputs outputs"]) -> tuple[Array, ...]:
    """Rounding errors to the nearest code, to the one below and to the one above."""
    return tuple(
        quantizer.values(quantizer.codes(kernel, rounding)) - kernel for rounding in (jnp.round, jnp.floor, jnp.ceil)
    )


def _refine_padded(
    nearest: np.ndarray, down: np.ndarray, up: np.ndarray, moment: np.ndarray, flips: int
) -> Float[np.ndarray, "inputs outputs"]:
    padding = max(0, _SMALLEST_HALF - len(moment))
    padded = [np.pad(array.T, ((0, 0), (0, padding))) for array in (nearest, down, up)]
    square = np.pad(moment, (0, padding)).astype(np.float32)
    return np.asarray(refine_rounding(*padded, square, flips)).T[: len(moment)]


def quantize_by_halves(
    kernel: Float[Array, "inputs outputs"],
    bias: Float[Array, " outputs"] | None,
    quantizer: OffsetUniform | DualUniform,
    gram: Float[np.ndarray, "extended extended"],
    penalty: float,
    flips: int,
    order: Int[np.ndarray, " inputs"],
) -> tuple[Float[Array, "inputs outputs"], Float[Array, " outputs"] | None]:
    """A weight on the quantizer's grid, and the bias, with little error of the layer's output (ERQ, "Weight
    Quantization Error Reduction").

    Half of the inputs that are left are rounded, their rounding refined, and the other half adjusted by ridge
    regression to what the layer now lacks; and so on until only the bias, which is not quantized, is left.

    gram: sum of a a^T over rows a = (input, 1). penalty: the ridge term, in units of the Gram matrix. flips: see
    refine_rounding; 0 rounds to the nearest. order: in which inputs are rounded.
    """
    inputs, rows = len(kernel), gram[-1, -1]
    # The bias is the weight of an input that is always 1.
    weights = np.array(kernel) if bias is None else np.concatenate([np.asarray(kernel), np.asarray(bias)[None]])
    left = np.asarray(order) if bias is None else np.append(order, inputs)
    while len(left) and left[0] != inputs:
        now, left = np.split(left, [max(1, len(left) // 2)])
        nearest, down, up = (np.asarray(errors)[now] for errors in _errors(quantizer, jnp.asarray(weights[:inputs])))
        if flips:
            # mean mean^T + unbiased covariance, which is not quite the second moment.
            mean = gram[now, -1] / rows
            moment = (gram[np.ix_(now, now)] - np.outer(mean, mean)) / max(rows - 1, 1)
            nearest = _refine_padded(nearest, down, up, moment, flips)
        weights[now] += nearest
        weights[left] -= ridge(gram[np.ix_(left, left)], gram[np.ix_(left, now)] @ nearest, penalty)
    return jnp.asarray(weights[:inputs]), None if bias is None else jnp.asarray(weights[inputs])


def adjust_by_input(
    kernel: Float[np.ndarray, "inputs outputs"],
    nearest: Callable[[Float[np.ndarray, " outputs"]], Float[np.ndarray, " outputs"]],
    moment: Float[np.ndarray, "inputs inputs"],
    damping: float = 0.01,
) -> Float[np.ndarray, "inputs outputs"]:
    """Weights, not rounded yet, whose roundings to the nearest keep what they can of the layer's output (GPTQ, Frantar
    et al. 2022, algorithm 1).

    One input after the other is rounded, those that are read most first, and those that are left take up the error.
    nearest: values on the grid for the weights of one input. moment: sum or mean of x x^T over what the layer reads;
    what makes it indefinite must be smaller than the damping. damping: added to its diagonal, as a fraction of the
    diagonal's mean.
    """
    moment = np.asarray(moment, np.float64)
    order = np.argsort(-np.diag(moment), kind="stable")
    regular = moment[np.ix_(order, order)]
    regular = regular + damping * max(np.trace(regular) / len(regular), np.finfo(np.float32).tiny) * np.eye(
        len(regular)
    )
    feedback = np.linalg.cholesky(np.linalg.inv(regular)).T
    adjusted = np.asarray(kernel, np.float64)[order]
    errors = np.empty_like(adjusted)
    for start in range(0, len(adjusted), _BLOCK):  # what lies beyond a block takes up its errors all at once
        stop = min(start + _BLOCK, len(adjusted))
        for row in range(start, stop):
            errors[row] = (adjusted[row] - nearest(adjusted[row])) / feedback[row, row]
            adjusted[row + 1 : stop] -= np.outer(feedback[row, row + 1 : stop], errors[row])
        adjusted[stop:] -= feedback[start:stop, stop:].T @ errors[start:stop]
    found = np.empty_like(adjusted)
    found[order] = adjusted
    return found
