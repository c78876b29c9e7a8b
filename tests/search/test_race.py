"""The race drops candidates that fall behind, and no loss that it gives differs from the evaluator's."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cptv_jax.search import Evaluator, EvolQ, Generational, Objective, RacingEvaluator
from cptv_jax.search.loop import Search, run_search
from cptv_jax.search.race import _rungs
from cptv_jax.search.state import initial_state

Subject = Any  # tests/search/conftest.py


def pair(toy: Subject, batch: int = 3) -> tuple[Evaluator, RacingEvaluator]:
    options: dict[str, Any] = {"stages": toy.stages, "batches": toy.batches(batch), "teacher": toy.teacher(batch)}
    options |= {"loss": Objective("mse"), "images": 3}
    return Evaluator(**options), RacingEvaluator(**options)


@pytest.mark.parametrize(
    ("batches", "expected"),
    [
        (1, [(0, 1)]),
        (2, [(0, 1), (1, 2)]),
        (8, [(0, 1), (1, 2), (2, 4), (4, 8)]),
        (9, [(0, 1), (1, 2), (2, 4), (4, 8), (8, 9)]),
    ],
)
def test_rungs_double_and_cover_every_batch_once(batches: int, expected: list[tuple[int, int]]) -> None:
    assert _rungs(batches) == expected


@pytest.mark.parametrize("sigma", [0.02, 0.3])
def test_survivors_have_their_whole_loss_and_the_others_infinity(toy: Subject, sigma: float) -> None:
    whole, racing = pair(toy)
    for index in (2, 1, 0):
        strategy = Generational(sigma=sigma, children=8)
        population, _ = strategy.ask(strategy.init(toy.stages[index].candidate, 0.0), jax.random.key(index))
        exact, found = whole.losses(index, population), racing.losses(index, population)
        kept = np.isfinite(found)
        np.testing.assert_array_equal(found[kept], exact[kept])
        assert kept.sum() <= 1  # three halvings of eight
        # Nothing that is worse than the present scales survives.
        assert (found[kept] <= whole.loss_of(index, toy.stages[index].candidate)).all()


def test_work_is_saved(toy: Subject) -> None:
    _, racing = pair(toy)
    evaluated = 0
    original = racing.batch_losses

    def counting(index: int, population: Any, first: int = 0, last: int | None = None) -> np.ndarray:
        nonlocal evaluated
        last = len(racing.batches) if last is None else last
        evaluated += jax.tree.leaves(population)[0].shape[0] * (last - first)
        return original(index, population, first, last)

    racing.batch_losses = counting  # type: ignore[method-assign]
    strategy = Generational(sigma=0.1, children=8)
    population, _ = strategy.ask(strategy.init(toy.stages[1].candidate, 0.0), jax.random.key(0))
    racing.losses(1, population)
    # Eight batches: the present scales on all, then at most 8 + 4 + 2 * 2 + 4 of 64.
    assert 8 + 8 <= evaluated <= 8 + 8 + 4 + 4 + 4


def test_equal_losses_survive_so_that_the_present_scales_have_a_loss(toy: Subject) -> None:
    whole, racing = pair(toy)
    for index in (2, 0):
        assert racing.loss_of(index, toy.stages[index].candidate) == whole.loss_of(index, toy.stages[index].candidate)


@pytest.mark.parametrize("strategy", [EvolQ(step=0.02, passes=2), Generational(children=4, sigma=0.1, passes=2)])
def test_a_search_with_a_race_never_gets_worse_and_knows_its_loss(toy: Subject, strategy: Any) -> None:
    whole, racing = pair(toy)
    state = run_search(racing, Search(strategy, jax.random.key(0)), initial_state(racing))
    assert state.loss is not None and state.loss <= state.log[0].loss
    for index, stage in enumerate(toy.stages):
        whole.accept(index, state.scales[stage.name])
    last = jax.tree.map(jnp.asarray, state.scales["head"])
    assert whole.loss_of(2, last) == state.loss


def test_a_candidate_that_is_accepted_from_where_it_was_found_brings_its_losses_along(toy: Subject) -> None:
    """Else they would be computed again; the race must go on as from a fresh evaluator that holds the candidate."""
    _, racing = pair(toy)
    index, candidate = 2, toy.stages[2].candidate
    racing.loss_of(index, candidate)
    finer = jax.tree.map(lambda leaf: jnp.asarray(leaf)[None] * jnp.asarray([2.0, 1.0, 0.9]), candidate)
    losses = racing.losses(index, finer)
    row = int(np.argmin(losses))
    racing.losses(index, finer)
    chosen = jax.tree.map(lambda leaf: leaf[row], finer)
    racing.accept(index, chosen, (2, row))
    _, fresh = pair(toy)
    fresh.accept(index, chosen)
    np.testing.assert_array_equal(
        racing._reference, fresh.batch_losses(index, jax.tree.map(lambda x: x[None], chosen))[0]
    )
