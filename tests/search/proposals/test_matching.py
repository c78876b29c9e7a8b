"""Pairs of a student and its teacher: both compute what they compute alone, and the error is that of the stages."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cptv_jax.quantized.candidate import Space
from cptv_jax.quantized.execution import Differentiable, Unrounded
from cptv_jax.quantized.model import QuantizedModel
from cptv_jax.runtime.forward import array_of, stage_inputs
from cptv_jax.runtime.stacking import runs_of
from cptv_jax.search import MatchingLoss, Objective, channel_variances, paired
from cptv_jax.search.proposals.matching import Pair, relative_errors


def test_an_error_is_relative_to_each_channels_variance() -> None:
    rng = np.random.default_rng(0)
    teacher = rng.normal(size=(4, 5, 3)) * [1, 100, 0] + [0, 7, 2]  # the last channel is constant
    student = teacher + rng.normal(size=(4, 5, 3)) * [0.1, 10, 0]
    variance = teacher.reshape(20, 3).var(0)
    found = relative_errors(*(jnp.asarray(x, jnp.float32) for x in (student, teacher, variance)))
    # Float32 sums of a few values.
    np.testing.assert_allclose(found, ((student - teacher) ** 2 / (variance + 1e-6)).mean((1, 2)), rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("teacher", ["float", "published"])
def test_a_pair_computes_both_models_and_adds_up_the_errors_between(
    vit_model: tuple[QuantizedModel, np.ndarray], teacher: str
) -> None:
    model, images = vit_model
    x = jnp.asarray(images[:10])
    students = model.stages()
    teachers = model.model.stages() if teacher == "float" else model.stages(Unrounded())
    variances = channel_variances(teachers, jnp.asarray(images), array_of)
    of_student, of_teacher = stage_inputs(students, x), stage_inputs(teachers, x)
    pair = stage_inputs(paired(students, teachers, array_of, variances), x)[-1]
    # The same operations in one program, whose compiler may sum in another order.
    np.testing.assert_allclose(pair.student.logits, of_student[-1].logits, atol=1e-5)
    np.testing.assert_allclose(pair.teacher.logits, of_teacher[-1].logits, atol=1e-5)
    between = zip(of_student[1:-1], of_teacher[1:-1], variances, strict=True)
    errors = [relative_errors(array_of(s), array_of(t), variance) for s, t, variance in between]
    np.testing.assert_allclose(pair.error, sum(errors), rtol=1e-4)
    loss = MatchingLoss(Objective("mse"), 3.0, len(errors))(pair)
    expected = np.mean((pair.student.logits - pair.teacher.logits) ** 2) + 3 * np.mean(pair.error) / len(errors)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    alone = stage_inputs(paired(students, teachers, array_of, []), x)[-1]
    assert not np.any(alone.error)
    assert MatchingLoss(Objective("mse"), 3.0, 0)(alone) == Objective("mse")(alone.student, alone.teacher)


def test_variances_are_those_of_each_channel_over_images_and_tokens(
    vit_model: tuple[QuantizedModel, np.ndarray],
) -> None:
    model, images = vit_model
    outputs = stage_inputs(model.model.stages(), jnp.asarray(images[:10]))[1:-1]
    variances = channel_variances(model.model.stages(), jnp.asarray(images[:10]), array_of)
    for output, variance in zip(outputs, variances, strict=True):
        values = np.asarray(array_of(output), np.float64)
        np.testing.assert_allclose(variance, values.reshape(-1, values.shape[-1]).var(0), rtol=1e-4)


def test_blocks_that_compute_alike_share_a_program_as_pairs_too(vit_model: tuple[QuantizedModel, np.ndarray]) -> None:
    model, images = vit_model
    students = model.stages(
        Differentiable(), Space([s for s in model.quantizers if s.endswith(".weight")], offsets=True)
    )
    variances = channel_variances(model.model.stages(), images, array_of)
    runs, _ = runs_of(paired(students, model.model.stages(), array_of, variances))
    assert [run.length for run in runs] == [run.length for run in runs_of(students)[0]]


@pytest.mark.slow
def test_no_derivative_passes_the_teacher(vit_model: tuple[QuantizedModel, np.ndarray]) -> None:
    model, images = vit_model
    variances = channel_variances(model.model.stages(), images, array_of)
    stages = paired(model.stages(Differentiable()), model.model.stages(), array_of, variances)
    stage, before = stages[1], stage_inputs(stages, images[:2])[1]

    def error(state: dict[str, object]) -> jax.Array:
        pair = stage.function(state, before)
        assert isinstance(pair, Pair)
        return jnp.sum(pair.error)

    gradients = jax.jit(jax.grad(error, allow_int=True))(stage.state)
    assert all(np.all(np.asarray(g) == 0) for g in jax.tree.leaves(gradients["teacher"]["weights"]))
    assert any(np.any(np.asarray(g) != 0) for g in jax.tree.leaves(gradients["student"]["weights"]))
