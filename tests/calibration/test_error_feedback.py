"""Closed-form pieces: ERQ's refined rounding and ridge regression, GPTQ's rounding one input after the other."""

from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cptv_jax.calibration.error_feedback import adjust_by_input, quantize_by_halves, refine_rounding, ridge
from cptv_jax.quantizers import OffsetUniform

GENERATOR = np.random.default_rng(0)


def mixing(inputs: int) -> np.ndarray:
    """Makes independent inputs correlated, but not so much that one could stand for another."""
    return np.eye(inputs) + GENERATOR.normal(0, 0.5 / inputs**0.5, (inputs, inputs))


def problem(outputs: int, inputs: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Rounding errors (nearest, down, up) of a weight on the integers, and a moment of correlated inputs."""
    weight = GENERATOR.uniform(-3, 3, (outputs, inputs)).astype(np.float32)
    rows = GENERATOR.normal(size=(50, inputs)) @ mixing(inputs) + 1
    moment = (rows.T @ rows / 50).astype(np.float32)
    return np.round(weight) - weight, np.floor(weight) - weight, np.ceil(weight) - weight, moment


def objective(errors: np.ndarray, moment: np.ndarray) -> np.ndarray:
    return np.einsum("oi,ij,oj->o", errors, moment, errors, dtype=np.float64)


def flip_one_at_a_time(
    errors: np.ndarray, down: np.ndarray, up: np.ndarray, moment: np.ndarray, flips: int
) -> np.ndarray:
    """The published procedure for a single output channel, written as it is described (golden README, fact 27)."""
    errors = errors.copy()
    for _ in range(flips):
        gradient = 2 * moment @ errors
        gradient[errors * gradient <= 0] = 0
        index = int(np.argmax(np.abs(gradient)))
        target = errors[index] - gradient[index]
        nearer_up = abs(target - up[index]) <= abs(target - down[index])
        changed = errors.copy()
        changed[index] = up[index] if nearer_up else down[index]
        if changed @ moment @ changed > errors @ moment @ errors:
            break
        errors = changed
    return errors


@pytest.mark.parametrize("flips", [1, 3, 100])
def test_all_channels_at_once_are_refined_as_each_by_itself(flips: int) -> None:
    nearest, down, up, moment = problem(20, 12)
    found = np.asarray(refine_rounding(nearest, down, up, moment, flips))
    for row in range(20):
        errors = [array[row].astype(np.float64) for array in (nearest, down, up)]
        expected = flip_one_at_a_time(errors[0], errors[1], errors[2], moment.astype(np.float64), flips)
        np.testing.assert_allclose(found[row], expected, atol=1e-5)  # sums of float32 steps up and down


def test_refinement_never_makes_a_channel_worse_and_stays_on_the_grid() -> None:
    nearest, down, up, moment = problem(64, 10)
    found = np.asarray(refine_rounding(nearest, down, up, moment, 100))
    before, after = objective(nearest, moment), objective(found, moment)
    assert (after <= before * (1 + 1e-5)).all()
    assert np.mean(after < before * 0.99) > 0.5
    assert np.minimum(np.abs(found - down), np.abs(found - up)).max() < 1e-5
    best = min(
        float(objective(np.where(choice, up[:1], down[:1]), moment)[0]) for choice in product((True, False), repeat=10)
    )
    assert after[0] >= best * (1 - 1e-5)


def test_no_flips_leave_the_rounding_as_it_is() -> None:
    nearest, down, up, moment = problem(4, 6)
    np.testing.assert_array_equal(refine_rounding(nearest, down, up, moment, 0), nearest)


def test_ridge_solves_the_normal_equations() -> None:
    rows, target = GENERATOR.normal(size=(30, 5)), GENERATOR.normal(size=(30, 3))
    found = ridge(rows.T @ rows, rows.T @ target, 0.5)
    stacked = np.concatenate([rows, np.sqrt(0.5) * np.eye(5)])
    expected = np.linalg.lstsq(stacked, np.concatenate([target, np.zeros((5, 3))]), rcond=None)[0]
    np.testing.assert_allclose(found, expected, rtol=1e-10)


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("inputs", [1, 7, 40])
def test_a_weight_quantized_by_halves_lies_on_the_grid_and_errs_less(inputs: int, biased: bool) -> None:
    kernel = jnp.asarray(GENERATOR.normal(size=(inputs, 8)), jnp.float32)
    bias = jnp.asarray(GENERATOR.normal(size=8), jnp.float32) if biased else None
    rows = np.concatenate([GENERATOR.normal(size=(400, inputs)) @ mixing(inputs) + 0.5, np.ones((400, 1))], 1)
    quantizer = OffsetUniform(jnp.full(8, 0.5), jnp.full(8, 7.0), jnp.float32(0), jnp.float32(15))
    order = GENERATOR.permutation(inputs)
    found, moved = quantize_by_halves(kernel, bias, quantizer, rows.T @ rows, 1e-3, 100, order)
    np.testing.assert_allclose(quantizer.values(quantizer.codes(found)), found, atol=1e-5)

    def output(kernel: jax.Array, bias: jax.Array | None) -> np.ndarray:
        return rows[:, :-1] @ np.asarray(kernel) + (0 if bias is None else np.asarray(bias))

    nearest = quantizer.values(quantizer.codes(kernel))
    error = np.mean((output(found, moved) - output(kernel, bias)) ** 2)
    plain = np.mean((output(nearest, bias) - output(kernel, bias)) ** 2)
    assert (moved is None) == (bias is None)
    assert error < plain if biased or inputs > 1 else error <= plain * (1 + 1e-6)


def round_one_input_at_a_time(kernel: np.ndarray, moment: np.ndarray) -> np.ndarray:
    """Each input rounded, and all that are left solved for anew: what GPTQ's recursion computes without solving."""
    order = np.argsort(-np.diag(moment), kind="stable")
    weights = kernel.copy()
    for done in range(len(order)):
        now, left = order[: done + 1], order[done + 1 :]
        weights[order[done]] = np.round(weights[order[done]])
        error = (weights - kernel)[now]
        weights[left] = kernel[left] - np.linalg.solve(moment[np.ix_(left, left)], moment[np.ix_(left, now)] @ error)
    return weights


@pytest.mark.parametrize("inputs", [1, 7, 100])  # the last in two blocks
def test_inputs_are_rounded_as_if_the_rest_were_solved_for_each_time(inputs: int) -> None:
    kernel = GENERATOR.normal(0, 2, (inputs, 5))
    rows = GENERATOR.normal(size=(4 * inputs, inputs)) @ mixing(inputs)
    moment = rows.T @ rows
    adjusted = adjust_by_input(kernel, np.round, moment, damping=1e-12)
    np.testing.assert_array_equal(np.round(adjusted), round_one_input_at_a_time(kernel, moment))


def test_rounding_input_by_input_loses_less_of_the_output_than_rounding_to_the_nearest() -> None:
    kernel = GENERATOR.normal(0, 2, (64, 20))
    rows = GENERATOR.normal(size=(300, 64)) @ mixing(64) + 1
    moment = rows.T @ rows
    adjusted = adjust_by_input(kernel, np.round, moment)
    found, nearest = ((np.round(weights) - kernel).T for weights in (adjusted, kernel))
    assert objective(found, moment).sum() < 0.7 * objective(nearest, moment).sum()


def test_inputs_that_are_never_read_are_rounded_to_the_nearest() -> None:
    kernel = GENERATOR.normal(0, 2, (6, 3))
    moment = np.diag([1.0, 0.0, 2.0, 0.0, 3.0, 1.0])
    np.testing.assert_allclose(adjust_by_input(kernel, np.round, moment), kernel, rtol=1e-12)
    np.testing.assert_allclose(adjust_by_input(kernel, np.round, np.zeros((6, 6))), kernel, rtol=1e-12)
