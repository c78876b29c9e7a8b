"""The adapter for evosax: its distributions over log-scales, as a strategy like the others."""

import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cptv_jax.errors import InputError
from cptv_jax.search import Evosax
from cptv_jax.search.strategies.evosax import ALGORITHMS

pytest.importorskip("evosax")

START = {"a": jnp.asarray([0.1, 2.0, 30.0]), "b": jnp.float32(5.0)}
TARGET = {"a": jnp.asarray([0.12, 1.8, 33.0]), "b": jnp.float32(4.6)}


def distance(candidate: Any) -> jax.Array:
    """Squared distance of a candidate from the target, in log-scale."""
    errors = jax.tree.map(lambda x, y: jnp.sum(jnp.log(x / y) ** 2), candidate, TARGET)
    return sum(jax.tree.leaves(errors), jnp.zeros(()))


def losses_of(population: Any) -> np.ndarray:
    return np.asarray(jax.vmap(distance)(population), np.float64)


def run(strategy: Evosax, rounds: int, seed: int = 0) -> tuple[Any, list[float]]:
    state = strategy.init(START, float(distance(START)))
    found = [strategy.best(state)[1]]
    for index in range(rounds):
        population, state = strategy.ask(state, jax.random.fold_in(jax.random.key(seed), index))
        state = strategy.tell(state, population, losses_of(population))
        found.append(strategy.best(state)[1])
    return state, found


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_every_algorithm_approaches_the_optimum_and_never_leaves_its_best(algorithm: Any) -> None:
    strategy = Evosax(algorithm=algorithm, sigma=0.05, children=16)
    state, losses = run(strategy, 40)
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.1 * losses[0]
    candidate, loss = strategy.best(state)
    assert loss == pytest.approx(float(distance(candidate)), rel=1e-2)  # of differences of nearly equal logarithms


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_population_is_positive_has_the_asked_size_and_depends_on_its_key_alone(algorithm: Any) -> None:
    strategy = Evosax(algorithm=algorithm, sigma=0.05, children=6)
    state = strategy.init(START, 1.0)
    one, again, other = (strategy.ask(state, jax.random.key(seed))[0] for seed in (1, 1, 2))
    assert one["a"].shape == (6, 3) and one["b"].shape == (6,)
    assert all(bool(jnp.all(leaf > 0)) for leaf in jax.tree.leaves(one))
    jax.tree.map(np.testing.assert_array_equal, one, again)
    assert not np.array_equal(one["a"], other["a"])
    # One deviation is sigma in log-scale: 18 draws of it, whose deviation lies within a factor of two.
    assert 0.025 < float(jnp.std(jnp.log(one["a"] / START["a"]))) < 0.1


def test_what_a_strategy_is_told_alone_decides_what_it_becomes() -> None:
    strategy = Evosax(children=8)
    (first, _), (second, _) = run(strategy, 3), run(strategy, 3)
    jax.tree.map(np.testing.assert_array_equal, first.inner, second.inner)


def test_infinite_losses_are_survived_and_nothing_worse_is_taken() -> None:
    strategy = Evosax(children=8)
    state = strategy.init(START, 1.0)
    population, state = strategy.ask(state, jax.random.key(0))
    told = strategy.tell(state, population, np.full(8, np.inf))
    jax.tree.map(np.testing.assert_array_equal, strategy.best(told)[0], START)
    assert all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in jax.tree.leaves(strategy.ask(told, jax.random.key(1))[0]))
    equal = strategy.tell(state, population, np.full(8, 1.0))
    jax.tree.map(np.testing.assert_array_equal, strategy.best(equal)[0], START)


def test_pairs_need_an_even_number_of_children() -> None:
    with pytest.raises(InputError, match=r"search\.strategy\.children is 7, but PGPE draws pairs"):
        Evosax(algorithm="PGPE", children=7)


def test_without_evosax_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "evosax", None)
    with pytest.raises(InputError, match=r"install cptv_jax\[evosax\]"):
        Evosax()
