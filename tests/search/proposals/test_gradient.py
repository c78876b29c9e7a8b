"""Gradient proposals: of the numbers that the evaluator computes, in a direction that lowers their loss."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cptv_jax.quantized.candidate import Space
from cptv_jax.quantized.execution import Differentiable, Execution, Simulated
from cptv_jax.quantized.model import QuantizedModel
from cptv_jax.runtime.forward import array_of, forward
from cptv_jax.runtime.mesh import make_mesh
from cptv_jax.runtime.stacking import Run, runs_of, stack
from cptv_jax.runtime.stages import Output, Stage
from cptv_jax.search import Descent, Evaluator, GradientProposer, MatchingLoss, Objective, channel_variances, paired
from cptv_jax.search.proposals.base import Listener
from cptv_jax.search.proposals.gradient import _ADAM, _by_stage, _descend_program, _loss, _pieces, mixed

BATCH, STEPS = 25, 6
LOSS = Objective()
PAIR_LOSS = MatchingLoss(LOSS, 1.0, 5)


def searched(site: str) -> bool:
    return site.startswith("blocks.") and site.endswith((".weight", "residual1"))


def stages_of(model: QuantizedModel, execution: Execution = Simulated()) -> tuple[Stage, ...]:  # noqa: B008 - frozen
    return model.stages(execution, Space([site for site in model.quantizers if searched(site)], offsets=True))


def paired_stages(model: QuantizedModel, images: np.ndarray) -> list[Stage]:
    teachers = model.model.stages()
    variances = channel_variances(teachers, images, array_of)
    return paired(stages_of(model, Differentiable()), teachers, array_of, variances)


@pytest.fixture(scope="module")
def teacher(vit_model: tuple[QuantizedModel, np.ndarray]) -> Output:
    model, images = vit_model
    return jax.tree.map(np.asarray, forward(model.model.stages(), images))


@pytest.fixture(scope="module")
def proposer(vit_model: tuple[QuantizedModel, np.ndarray]) -> GradientProposer:
    model, images = vit_model
    descent = Descent(STEPS, 0.01, BATCH, passes=2, mixup=True)
    stages = paired_stages(model, images)
    return GradientProposer(stages, lambda rows: images[rows], len(images), PAIR_LOSS, descent, 5, make_mesh())


@pytest.fixture(scope="module")
def scales(vit_model: tuple[QuantizedModel, np.ndarray]) -> dict[str, Any]:
    return {stage.name: stage.candidate for stage in stages_of(vit_model[0]) if stage.searchable}


def flat(tree: Any) -> np.ndarray:
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


def moved(stages: Sequence[Stage], direction: dict[str, Any], fraction: float = 1.0) -> list[Stage]:
    steps = jax.tree.map(lambda step: fraction * step, direction)
    return [s.with_candidate(s.move(s.candidate, steps[s.name])) if s.name in steps else s for s in stages]


def test_a_candidate_holds_scales_and_zero_points_and_one_scale_for_powers_of_two(scales: dict[str, Any]) -> None:
    weight, residual = scales["blocks.0"]["attn.qkv.weight"], scales["blocks.0"]["residual1"]
    assert weight.scale.shape == weight.zero_point.shape == (192,)
    np.testing.assert_array_equal(weight.factor, np.ones(192))
    assert residual.scale.shape == ()
    assert residual.exponents.shape == (64,)
    assert np.any(residual.exponents) and np.all(residual.exponents <= 3 / 25)


@pytest.mark.slow
def test_it_differentiates_the_numbers_that_the_evaluator_computes(
    vit_model: tuple[QuantizedModel, np.ndarray], proposer: GradientProposer, scales: dict[str, Any]
) -> None:
    model, images = vit_model
    direction = proposer.propose(scales, 0, jax.random.key(0)).steps
    smooth = forward(moved(stages_of(model, Differentiable()), direction), jnp.asarray(images))
    exact = forward(moved(stages_of(model), direction), images)
    # Sums of float32 in another order: not one step of the logits is off.
    np.testing.assert_allclose(smooth.logits, exact.logits, atol=1e-5)


@pytest.mark.slow
def test_loops_checkpoints_and_what_fills_the_last_piece_leave_the_gradient_as_it_is(
    vit_model: tuple[QuantizedModel, np.ndarray],
) -> None:
    model, images = vit_model
    stages = paired_stages(model, images)
    x = jnp.asarray(images[:BATCH])

    @jax.jit
    def plain(steps: list[Any]) -> jax.Array:
        y: Any = x
        for stage, step in zip(stages, steps, strict=True):
            y = stage.function(stage.bind(stage.state, stage.move(stage.candidate, step)), y)
        return PAIR_LOSS(y)

    runs, home = runs_of(stages)
    assert max(run.length for run in runs) > 1  # else nothing is looped over
    members = [[i for i, (run, _) in enumerate(home) if run == number] for number in range(len(runs))]

    @jax.jit
    def looped(steps: list[Any]) -> jax.Array:
        states, candidates, by_run = (
            [stack([trees[i] for i in run]) for run in members]
            for trees in ([s.state for s in stages], [s.candidate for s in stages], steps)
        )
        filled = jnp.concatenate([x, 9 * x[:3]])
        return _loss(tuple(runs), PAIR_LOSS, BATCH, states, candidates, by_run, filled.reshape(4, 7, *x.shape[1:]))

    zeros = [jax.tree.map(jnp.zeros_like, stage.candidate) for stage in stages]
    expected, found = jax.grad(plain)(zeros), jax.grad(looped)(zeros)
    assert np.any(flat(expected) != 0)
    # Both sum float32 over thousands of terms, in other orders.
    np.testing.assert_allclose(flat(found), flat(expected), rtol=2e-3, atol=1e-4 * np.abs(flat(expected)).max())


@pytest.mark.slow
def test_more_pieces_take_memory_for_their_stage_inputs_alone(vit_model: tuple[QuantizedModel, np.ndarray]) -> None:
    """What is computed within a stage is there for one piece at a time: elsewise a piece takes ten times as much."""
    model, images = vit_model
    stages = paired_stages(model, images)
    runs, home = runs_of(stages)
    members = [[i for i, (run, _) in enumerate(home) if run == number] for number in range(len(runs))]
    zeros = [jax.tree.map(jnp.zeros_like, stage.candidate) for stage in stages]
    states, candidates, steps = (
        [stack([trees[i] for i in run]) for run in members]
        for trees in ([s.state for s in stages], [s.candidate for s in stages], zeros)
    )

    def temporaries(pieces: int) -> int:
        x = jnp.zeros((pieces, 5, *images.shape[1:]))
        gradient = jax.jit(jax.grad(_loss, 5), static_argnums=(0, 1, 2))
        compiled: Any = gradient.lower(tuple(runs), PAIR_LOSS, 5 * pieces, states, candidates, steps, x).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    tokens = 5 * 17 * 64 * 4  # bytes of a stage's input, five images
    kept = 2 * len(stages) * tokens  # the student's and the teacher's
    assert (temporaries(12) - temporaries(4)) / 8 < 3 * kept


@pytest.mark.slow
def test_a_proposal_lowers_the_true_loss(
    vit_model: tuple[QuantizedModel, np.ndarray], teacher: Output, proposer: GradientProposer, scales: dict[str, Any]
) -> None:
    model, images = vit_model
    said: list[tuple[str, int]] = []
    direction, means = proposer.propose(
        scales, 0, jax.random.key(0), None, Listener(lambda text, steps: said.append((text, steps)))
    )
    assert len(said) == proposer.steps == STEPS and set(direction) == set(scales)
    losses = [float(text.rpartition(" ")[2]) for text, steps in said if steps == 1]
    assert means == (pytest.approx(np.mean(losses), abs=1e-5),)  # fewer than 25, said with five digits
    evaluator = Evaluator(stages_of(model), [images], [teacher], LOSS, 25)
    last = max(i for i, stage in enumerate(evaluator.stages) if stage.searchable)
    before = evaluator.loss_of(last, evaluator.stages[last].candidate)
    for index, stage in enumerate(moved(evaluator.stages, direction)):
        if stage.searchable:
            evaluator.accept(index, stage.candidate)
    assert evaluator.loss_of(last, evaluator.stages[last].candidate) < before


@pytest.mark.slow
def test_a_proposal_that_was_interrupted_goes_on_with_the_same_bits(
    proposer: GradientProposer, scales: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cptv_jax.search.proposals.gradient._SAVED_EVERY", 2)
    saved: list[dict[str, np.ndarray]] = []
    whole = proposer.propose(scales, 1, jax.random.key(3), listener=Listener(on_progress=saved.append))
    assert [int(progress["done"]) for progress in saved] == [2, 4]
    for progress in saved:
        # Names that tell what is what, also on disk.
        assert {name.partition(".")[0] for name in progress} == {"done", "losses", "step", "moment"}
        steps: list[int] = []
        again = proposer.propose(
            scales,
            1,
            jax.random.key(3),
            progress,
            Listener(lambda text, count: steps.append(count)),  # noqa: B023
        )
        assert len(steps) == STEPS - int(progress["done"])
        np.testing.assert_array_equal(flat(again), flat(whole))


@pytest.mark.parametrize(
    ("batch", "limit", "devices", "pieces"),
    [
        (25, 10, 2, (3, 10)),
        (20, 15, 2, (2, 10)),
        (15, 10, 1, (2, 8)),
        (10, 100, 8, (1, 16)),
        (7, 3, 1, (3, 3)),
        (10, 1, 4, (3, 4)),
        (100, 50, 2, (2, 50)),
    ],
)
def test_a_batch_is_computed_in_equal_pieces_that_every_device_has_a_part_of(
    batch: int, limit: int, devices: int, pieces: tuple[int, int]
) -> None:
    assert _pieces(batch, limit, devices) == pieces


@pytest.mark.slow
def test_the_key_decides_the_proposal(proposer: GradientProposer, scales: dict[str, Any]) -> None:
    one, same, other = (flat(proposer.propose(scales, 0, jax.random.key(seed)).steps) for seed in (0, 0, 1))
    np.testing.assert_array_equal(one, same)
    assert np.any(one != other)


@pytest.mark.slow
def test_later_passes_take_smaller_steps_with_the_same_program(
    proposer: GradientProposer, scales: dict[str, Any]
) -> None:
    first, second = (flat(proposer.propose(scales, number, jax.random.key(0)).steps) for number in (0, 1))
    assert np.abs(second).mean() < 0.5 * np.abs(first).mean()
    assert _descend_program()._cache_size() == 1


def test_the_tensors_of_stacked_blocks_are_each_relative_to_their_own_gradients() -> None:
    def unused(state: Any, x: Any) -> Any:
        raise AssertionError

    runs = tuple(Run(unused, unused, unused, length) for length in (1, 3, 2))
    of_blocks = jnp.outer(jnp.array([1e-3, 1.0, 1e3]), jnp.ones(4))
    gradients = [{"a": jnp.ones(5), "b": jnp.float32(7)}, {"a": of_blocks}, {}]
    moments = _by_stage(runs, _ADAM.init, gradients)
    updates = [update for update, _ in _by_stage(runs, _ADAM.update, gradients, moments)]
    assert jax.tree.map(jnp.shape, updates) == jax.tree.map(jnp.shape, gradients)
    np.testing.assert_allclose(flat(updates), 1, rtol=1e-6)  # roundings of float32


def test_each_image_is_mixed_with_another_in_a_proportion_of_its_own() -> None:
    images = np.eye(64, dtype=np.float32).reshape(64, 8, 8, 1)  # so that a mixture tells what it is made of
    rows = mixed(images, np.random.default_rng(0)).reshape(64, 64)
    assert rows.dtype == np.float32
    np.testing.assert_allclose(rows.sum(1), 1, atol=1e-6)  # two proportions in float32
    shares = np.diag(rows)
    assert np.all(np.count_nonzero(rows, axis=1) <= 2)
    assert len(np.unique(shares)) > 60 and shares.min() < 0.1 and shares.max() > 0.9
    partners = np.argmax(rows - np.diag(shares), axis=1)[shares < 1]
    assert len(np.unique(partners)) == len(partners)


def test_every_step_mixes_anew_and_the_key_decides_how(
    proposer: GradientProposer, scales: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[np.ndarray] = []
    drawn: list[int] = []

    def place(mesh: Any, tree: Any, *where: Any) -> Any:
        if isinstance(tree, np.ndarray):
            given.append(tree.reshape(-1, *tree.shape[2:]))
        return tree

    def no_step(*arguments: Any) -> Any:
        return arguments[5], arguments[6], 0.0

    def mixing(images: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        drawn.append(rng.bit_generator.state["state"]["state"])
        return mixed(images, rng)

    monkeypatch.setattr("cptv_jax.search.proposals.gradient.mixed", mixing)
    monkeypatch.setattr("cptv_jax.search.proposals.gradient.place", place)
    monkeypatch.setattr("cptv_jax.search.proposals.gradient._descend_program", lambda: no_step)
    for seed in (0, 0, 1):
        proposer.propose(scales, 0, jax.random.key(seed))
    assert drawn[:STEPS] == drawn[STEPS : 2 * STEPS] and len(set(drawn)) == 2 * STEPS
    first, again, other = given[:STEPS], given[STEPS : 2 * STEPS], given[2 * STEPS :]
    np.testing.assert_array_equal(first, again)
    plain = proposer.read(np.arange(proposer.count))
    assert all(not np.array_equal(x, y) for x, y in zip(first, other, strict=True))
    unmixed = [x for x in np.concatenate(first) if any(np.array_equal(image, x) for image in plain)]
    assert len(unmixed) < STEPS * BATCH / 5  # one image a batch is expected to be paired with itself


def test_the_rate_falls_to_nothing() -> None:
    descent = Descent(steps=10, rate=0.02, batch=1, passes=3)
    rates = [float(descent.rate_at(step)) for step in range(31)]
    assert rates[0] == pytest.approx(0.02) and rates[30] == pytest.approx(0.0, abs=1e-9)
    assert all(a > b for a, b in pairwise(rates))
