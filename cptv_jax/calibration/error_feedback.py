"""Weight quantization that compensates for its own rounding error.

There are two closed forms: half of the inputs are rounded, their rounding is refined, and the other half is adjusted by
ridge regression (ERQ); or one input after the other is rounded, and the rest is adjusted each time (GPTQ).
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from cptv_jax.quantizers import DualUniform, OffsetUniform

_SMALLEST_HALF = 32  # smaller halves are padded to this size and share one compiled program
_BLOCK = 64  # inputs


def ridge(
    gram: Float[np.ndarray, "inputs inputs"], cross: Float[np.ndarray, "inputs outputs"], penalty: float
) -> Float[np.ndarray, "inputs outputs"]:
    """Solves a ridge regression: (gram + penalty I)^-1 cross.

    It is solved in float64 on the host, because a Gram matrix of few rows is nearly singular.

    Args:
        gram: Sum of a a^T over the rows a.
        cross: Sum of a r^T over the rows a and the residuals r.
        penalty: The ridge term, in units of the Gram matrix.

    Returns:
        The coefficients, float64.
    """
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
    """Lowers e^T E e for the rounding errors e of each output channel (ERQ, "Rounding Refinement").

    Args:
        errors: Quantized minus original weight.
        down: The errors after rounding down.
        up: The errors after rounding up.
        moment: E, approximately the mean of x x^T over the rows x that the weights are multiplied with.
        flips: How many roundings of each output channel are reconsidered. Each time it is the one with the steepest
            gradient, among those that a step against the gradient would shrink; the new rounding is kept unless the
            objective rises.

    Returns:
        The errors after refinement.
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
        # The change of e^T E e when one entry of e changes, so that the whole need not be computed again.
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
    """Returns the rounding errors to the nearest code, to the one below and to the one above."""
    return tuple(
        quantizer.values(quantizer.codes(kernel, rounding)) - kernel for rounding in (jnp.round, jnp.floor, jnp.ceil)
    )


def _refine_padded(
    nearest: np.ndarray, down: np.ndarray, up: np.ndarray, moment: np.ndarray, flips: int
) -> Float[np.ndarray, "inputs outputs"]:
    """Returns refined rounding errors; few inputs are padded to `_SMALLEST_HALF`."""
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
    """Quantizes a layer's weight and adjusts its bias so that the layer's output changes little.

    ERQ, "Weight Quantization Error Reduction": half of the inputs that are left are rounded, their rounding is refined,
    and the other half is adjusted by ridge regression to compensate. This repeats until only the bias, which is not
    quantized, is left.

    Args:
        kernel: The weight.
        bias: The layer's bias, if it has one.
        quantizer: The weight's quantizer.
        gram: Sum of a a^T over the rows a = (input, 1).
        penalty: The ridge term, in units of the Gram matrix.
        flips: See `refine_rounding`; 0 rounds to the nearest.
        order: The order in which inputs are rounded.

    Returns:
        The weight on the quantizer's grid, and the bias.
    """
    inputs, rows = len(kernel), gram[-1, -1]
    # The bias is the weight of an input that is always 1.
    weights = np.array(kernel) if bias is None else np.concatenate([np.asarray(kernel), np.asarray(bias)[None]])
    left = np.asarray(order) if bias is None else np.append(order, inputs)
    while len(left) and left[0] != inputs:
        now, left = np.split(left, [max(1, len(left) // 2)])
        nearest, down, up = (np.asarray(errors)[now] for errors in _errors(quantizer, jnp.asarray(weights[:inputs])))
        if flips:
            # mean mean^T + unbiased covariance: not quite the second moment.
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
    """Adjusts weights so that rounding them to the nearest keeps as much of the layer's output as it can.

    GPTQ (Frantar et al. 2022, algorithm 1). The inputs are rounded one after the other, those that are read most first,
    and the inputs that are left take up the error.

    Args:
        kernel: The weights, not rounded yet.
        nearest: Returns the values on the grid that are nearest to the weights of one input.
        moment: Sum or mean of x x^T over the rows x that the layer reads. Whatever makes it indefinite must be smaller
            than the damping.
        damping: What is added to the moment's diagonal, as a fraction of the diagonal's mean.

    Returns:
        The adjusted weights, float64, not rounded.
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
    for start in range(0, len(adjusted), _BLOCK):  # inputs beyond a block take up its errors all at once
        stop = min(start + _BLOCK, len(adjusted))
        for row in range(start, stop):
            errors[row] = (adjusted[row] - nearest(adjusted[row])) / feedback[row, row]
            adjusted[row + 1 : stop] -= np.outer(feedback[row, row + 1 : stop], errors[row])
        adjusted[stop:] -= feedback[start:stop, stop:].T @ errors[start:stop]
    found = np.empty_like(adjusted)
    found[order] = adjusted
    return found
