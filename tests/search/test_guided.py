"""The guided strategy: what its children are, and which of them survives."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cptv_jax.runtime.stages import scale_by
from cptv_jax.search import Guided, StageContext

PARENT = {"weight": jnp.asarray([0.1, 0.2, 0.4, 0.05]), "input": jnp.float32(0.3)}
DIRECTION = {"weight": jnp.asarray([0.3, -0.2, 0.1, 0.25]), "input": jnp.float32(-0.15)}
CHILDREN = 30
CONTEXT = StageContext(direction=DIRECTION, move=scale_by)


def steps_of(strategy: Guided, seed: int = 0) -> np.ndarray:
    """Children of PARENT as steps from it, [children, parameters]."""
    population, _ = strategy.ask(strategy.init(PARENT, 1.0, CONTEXT), jax.random.key(seed))
    logs = jax.tree.map(lambda child, parent: np.log(np.asarray(child) / np.asarray(parent)), population, PARENT)
    return np.concatenate([np.reshape(leaf, (CHILDREN, -1)) for leaf in jax.tree.leaves(logs)], 1)


def guided(**options: Any) -> Guided:
    return Guided(children=CHILDREN, **options)


def test_a_fifth_of_the_children_go_further_or_back_along_the_direction() -> None:
    along = steps_of(guided())[::5] / np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(DIRECTION)])
    np.testing.assert_allclose(along, along[:, :1] * np.ones((1, 5)), rtol=1e-4)  # exp and log of float32
    assert along.min() < 0 < along.max() and len(set(along[:, 0])) == len(along)


def test_a_fifth_takes_back_a_random_part_of_the_direction() -> None:
    back = steps_of(guided())[1::5] / np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(DIRECTION)])
    taken = np.round(back)
    np.testing.assert_allclose(back, taken, atol=1e-4)  # exp and log of float32
    assert set(np.unique(taken)) == {-1.0, 0.0}
    assert 0.2 < -taken.mean() < 0.8


def test_a_fifth_takes_random_steps_of_the_deviation_asked_for() -> None:
    random = np.concatenate([steps_of(guided(sigma=0.02), seed)[2::5] for seed in range(17)])
    assert random.std() == pytest.approx(0.02, rel=0.1)  # of 500 numbers: their deviation is known to 3 percent
    assert abs(random.mean()) < 0.003


def test_a_fifth_goes_along_by_a_length_of_its_own_for_each_parameter_and_a_fifth_takes_some_back_whole() -> None:
    direction = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(DIRECTION)])
    along, back = (steps_of(guided())[kind::5] / direction for kind in (3, 4))
    one, weight = along[:, :1], along[:, 1:]  # the leaves: "input", and "weight" with four elements
    np.testing.assert_allclose(weight, weight[:, :1] * np.ones((1, 4)), rtol=1e-4)  # exp and log of float32
    assert not np.any(np.isclose(one, weight, rtol=1e-2))
    many = np.concatenate([back, *(steps_of(guided(), seed)[4::5] / direction for seed in range(1, 5))])
    whole = {tuple(row) for row in np.abs(np.round(many)).astype(int)}
    assert whole == {(0, 0, 0, 0, 0), (0, 1, 1, 1, 1), (1, 0, 0, 0, 0), (1, 1, 1, 1, 1)}


def test_the_elder_survives_a_tie_and_the_best_child_a_loss() -> None:
    strategy = guided()
    state = strategy.init(PARENT, 1.0, CONTEXT)
    population, state = strategy.ask(state, jax.random.key(0))
    losses = np.full(CHILDREN, 1.0)
    kept, loss = strategy.best(strategy.tell(state, population, losses))
    jax.tree.map(np.testing.assert_array_equal, kept, PARENT)
    assert loss == 1.0
    losses[7] = 0.5
    best, loss = strategy.best(strategy.tell(state, population, losses))
    jax.tree.map(lambda one, all: np.testing.assert_array_equal(one, all[7]), best, population)
    assert loss == 0.5


def test_random_steps_grow_while_they_succeed_and_shrink_while_they_fail() -> None:
    strategy = guided()
    state = strategy.init(PARENT, 1.0, CONTEXT)
    population, state = strategy.ask(state, jax.random.key(0))
    worse, better = np.full(CHILDREN, 2.0), np.full(CHILDREN, 2.0)
    better[2::5] = 0.5
    assert strategy.tell(state, population, worse).sigma < state.sigma < strategy.tell(state, population, better).sigma


def test_a_lone_child_leaves_the_deviation_as_it_is() -> None:
    strategy = Guided(children=1)
    state = strategy.init(PARENT, 1.0, CONTEXT)
    population, state = strategy.ask(state, jax.random.key(0))
    assert strategy.tell(state, population, np.asarray([2.0])).sigma == state.sigma


def test_it_goes_on_with_the_deviation_of_the_stage_before() -> None:
    strategy = guided(sigma=0.02)
    assert strategy.init(PARENT, 1.0, CONTEXT).sigma == 0.02
    state = strategy.init(PARENT, 1.0, replace(CONTEXT, carried=0.5))
    assert state.sigma == strategy.carried(state) == 0.5


def test_without_a_proposal_its_random_steps_are_all_that_moves() -> None:
    strategy = guided()
    population, _ = strategy.ask(strategy.init(PARENT, 1.0), jax.random.key(0))
    moved = np.any(np.asarray(population["weight"]) != np.asarray(PARENT["weight"]), 1)
    np.testing.assert_array_equal(moved, np.arange(CHILDREN) % 5 == 2)
