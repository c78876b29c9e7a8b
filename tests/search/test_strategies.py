"""Strategies: the published one against its transcription, the generational one against its contract."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cptv_jax.search import EvolQ, Generational, StageContext, Strategy
from cptv_jax.search.strategies.evol_q import Draws, State, published_step

Candidate = dict[str, Any]


def candidate(seed: int = 0) -> Candidate:
    """Scales as a stage has them: per channel, nested, and per tensor."""
    rng = np.random.default_rng(seed)
    return {
        "qkv": rng.uniform(1e-3, 0.1, 6).astype(np.float32),
        "mlp": {"fc1": rng.uniform(1e-3, 0.1, (4,)).astype(np.float32), "out": np.float32(0.02)},
    }


def flat(tree: Any) -> np.ndarray:
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


def rows(tree: Any) -> np.ndarray:
    """A population as [members, scales]."""
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]
    return np.concatenate([leaf.reshape(len(leaf), -1) for leaf in leaves], 1)


def unflat(vector: np.ndarray, like: Candidate) -> Candidate:
    leaves, structure = jax.tree.flatten(like)
    sizes = np.cumsum([np.size(leaf) for leaf in leaves])[:-1]
    parts = [part.reshape(np.shape(leaf)) for part, leaf in zip(np.split(vector, sizes), leaves, strict=True)]
    return jax.tree.unflatten(structure, parts)


# Evol-Q


def transcription(
    start: np.ndarray, loss: float, samples: list[list[int]], perturbations: list[np.ndarray], losses: list[float]
) -> tuple[list[np.ndarray], list[tuple[float, np.ndarray]]]:
    """The published evolution, in plain Python on flat vectors: what it evaluates, and its population at the end."""
    population = [(loss, start.astype(np.float64)) for _ in range(15)]
    evaluated = []
    for indices, perturbation, value in zip(samples, perturbations, losses, strict=True):
        best = None
        for index in sorted(indices):  # of equal losses the one that stands first
            if best is None or population[index][0] < population[best][0]:
                best = index
        assert best is not None
        child = np.array([abs(a + b) for a, b in zip(population[best][1], perturbation, strict=True)])
        evaluated.append(child)
        population.append((value, child))
        population = sorted(population, key=lambda member: member[0])  # stable
        population.pop()
    return evaluated, population


def draws_from(strategy: EvolQ, like: Candidate, rng: np.random.Generator) -> tuple[list[int], np.ndarray, Draws]:
    samples = rng.integers(0, strategy.population, strategy.samples)
    assert strategy.step is not None
    perturbation = rng.uniform(-strategy.step, strategy.step, flat(like).size)
    return samples.tolist(), perturbation, Draws(samples, unflat(perturbation, like))


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 40), st.sampled_from([1, 3, 10_000]), st.sampled_from([1e-4, 1e-3, 0.05]))
def test_the_published_evolution_is_followed_step_for_step(seed: int, cycles: int, levels: int, step: float) -> None:
    """Few loss levels make ties; step 0.05 makes sums negative, so that absolute values matter."""
    rng = np.random.default_rng(seed)
    strategy, start = EvolQ(step=step), candidate(seed)
    losses = (rng.integers(0, levels, cycles + 1) / levels).tolist()
    drawn = [draws_from(strategy, start, rng) for _ in range(cycles)]
    evaluated, population = transcription(
        flat(start), losses[0], [d[0] for d in drawn], [d[1] for d in drawn], losses[1:]
    )

    state = strategy.init(start, losses[0])
    for (_, _, draws), expected, value in zip(drawn, evaluated, losses[1:], strict=True):
        child = strategy.mutate(state, draws)
        np.testing.assert_array_equal(rows(child), expected[None])  # float64, the same additions
        state = strategy.tell(state, child, np.array([value]))
    np.testing.assert_array_equal(state.losses, [value for value, _ in population])
    np.testing.assert_array_equal(rows(state.candidates), [vector for _, vector in population])
    best, value = strategy.best(state)
    assert value == min(losses)
    np.testing.assert_array_equal(flat(best), population[0][1].astype(np.float32))
    assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(best))


def test_the_published_sizes_are_the_defaults() -> None:
    strategy = EvolQ()
    assert (strategy.population, strategy.samples, strategy.rounds, strategy.passes) == (15, 10, 3, 10)
    state = strategy.init(candidate(), 7.0)
    np.testing.assert_array_equal(rows(state.candidates), np.tile(flat(candidate()).astype(np.float64), (15, 1)))
    np.testing.assert_array_equal(state.losses, np.full(15, 7.0))
    child, _ = strategy.ask(state, jax.random.key(0))
    assert rows(child).shape == (1, flat(candidate()).size)
    assert all(leaf.dtype == np.float64 for leaf in jax.tree.leaves((state.candidates, child)))
    assert len(strategy.tell(state, child, np.array([8.0])).losses) == 15


@pytest.mark.parametrize(("bits", "step"), [(2, 1e-3), (3, 1e-3), (4, 1e-3), (6, 1e-3), (8, 1e-4)])
def test_the_published_step_depends_on_the_bits(bits: int, step: float) -> None:
    assert published_step(bits) == step
    # Of widths that differ, the last one's: the published code asks the projection.
    assert EvolQ().init(candidate(), 1.0, StageContext((5, bits))).step == step
    assert EvolQ(step=0.5).init(candidate(), 1.0, StageContext((bits,))).step == 0.5


def test_steps_are_uniform_within_their_bounds_and_samples_cover_the_population_with_replacement() -> None:
    strategy = EvolQ(step=0.25)
    state = strategy.init({"a": np.full(400, 5.0, np.float32), "b": np.full(400, 5.0, np.float32)}, 1.0)
    drawn = [strategy.draw(state, jax.random.key(i)) for i in range(30)]
    steps = np.concatenate([flat(d.perturbation) for d in drawn])
    samples = np.stack([d.samples for d in drawn])
    assert np.all(np.abs(steps) <= 0.25)
    # 24,000 draws: the mean's deviation is 0.25 / sqrt(3 * 24000) = 0.0009; five of them.
    assert abs(steps.mean()) < 0.005 and steps.max() > 0.2499 and steps.min() < -0.2499
    assert np.std(steps) == pytest.approx(0.25 / math.sqrt(3), rel=0.02)
    assert samples.shape == (30, 10) and set(samples.ravel()) == set(range(15))
    assert any(len(set(row)) < 10 for row in samples)  # with replacement
    both = drawn[0].perturbation
    assert not np.array_equal(both["a"], both["b"])


def test_a_cycle_draws_from_its_key_alone() -> None:
    strategy = EvolQ()
    state = strategy.init(candidate(), 1.0)
    again, other = (rows(strategy.ask(state, jax.random.key(seed))[0]) for seed in (3, 4))
    np.testing.assert_array_equal(rows(strategy.ask(state, jax.random.key(3))[0]), again)
    assert not np.array_equal(again, other)


def test_the_best_of_the_sampled_is_the_parent_and_of_equals_the_elder() -> None:
    strategy = EvolQ(population=4, samples=3)
    members = {"a": np.arange(4.0)[:, None] + 1}
    nothing = {"a": np.zeros(1)}
    state = State(members, np.array([1.0, 2.0, 2.0, 3.0]), 1e-3)
    assert strategy.parent(state, Draws(np.array([3, 2, 1]), nothing)) == 1
    assert strategy.parent(state, Draws(np.array([3, 3, 2]), nothing)) == 2
    assert strategy.parent(state, Draws(np.array([3, 0, 0]), nothing)) == 0
    np.testing.assert_array_equal(strategy.mutate(state, Draws(np.array([3, 2, 2]), nothing))["a"], [[3.0]])


def test_a_tie_keeps_the_elder_and_the_worst_leaves() -> None:
    strategy = EvolQ(population=3)
    state = State({"a": np.array([[1.0], [2.0], [3.0]])}, np.array([1.0, 2.0, 3.0]), 1e-3)
    child = {"a": np.array([[9.0]])}
    tied = strategy.tell(state, child, np.array([1.0]))
    np.testing.assert_array_equal(tied.candidates["a"], [[1.0], [9.0], [2.0]])
    assert strategy.best(tied)[0]["a"] == 1.0
    worst = strategy.tell(state, child, np.array([3.0]))
    np.testing.assert_array_equal(worst.candidates["a"], state.candidates["a"])
    infinite = strategy.tell(state, child, np.array([np.inf]))
    np.testing.assert_array_equal(infinite.losses, state.losses)
    better = strategy.tell(state, child, np.array([0.5]))
    np.testing.assert_array_equal(better.candidates["a"], [[9.0], [1.0], [2.0]])


# Generational


def evolve(strategy: Strategy, start: Candidate, loss_of: Any, rounds: int, seed: int = 0) -> tuple[Any, list[float]]:
    state = strategy.init(start, float(loss_of(flat(start)[None])[0]))
    values = [strategy.best(state)[1]]
    for index in range(rounds):
        population, state = strategy.ask(state, jax.random.fold_in(jax.random.key(seed), index))
        state = strategy.tell(state, population, loss_of(rows(population)))
        values.append(strategy.best(state)[1])
    return state, values


def log_distance(target: np.ndarray) -> Any:
    return lambda members: np.sum((np.log(members.astype(np.float64)) - np.log(target)) ** 2, 1)


def test_generations_converge_on_a_quadratic_loss_in_log_scale() -> None:
    start = candidate()
    target = flat(start) * np.random.default_rng(1).uniform(0.7, 1.4, flat(start).size)
    strategy = Generational(sigma=0.05, children=16, survivors=2)
    state, values = evolve(strategy, start, log_distance(target), 150)
    assert values[-1] < 1e-3 * values[0]
    np.testing.assert_allclose(flat(strategy.best(state)[0]), target, rtol=0.03)


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([0.01, 0.5, 2.0]))
def test_the_survivor_is_never_worse_than_its_parent_and_scales_stay_positive(seed: int, sigma: float) -> None:
    rng = np.random.default_rng(seed)
    strategy = Generational(sigma=sigma, children=8)
    state, values = evolve(strategy, candidate(seed), lambda members: rng.normal(size=len(members)), 6, seed)
    assert values == sorted(values, reverse=True)
    assert np.all(rows(state.parents) > 0) and np.all(np.isfinite(rows(state.parents)))
    np.testing.assert_array_equal(state.losses, np.sort(state.losses))


@pytest.mark.parametrize("children", [1, 8])
@pytest.mark.parametrize("survivors", [1, 2, 3])
def test_as_many_children_are_asked_for_and_as_many_survive_as_set(children: int, survivors: int) -> None:
    strategy = Generational(children=children, survivors=survivors)
    state = strategy.init(candidate(), 1.0)
    population, state = strategy.ask(state, jax.random.key(0))
    assert rows(population).shape == (children, flat(candidate()).size)
    assert len(np.unique(rows(population), axis=0)) == children
    state = strategy.tell(state, population, np.arange(children, dtype=float))
    assert rows(state.parents).shape[0] == survivors == len(state.losses)
    assert jax.tree.structure(strategy.best(state)[0]) == jax.tree.structure(candidate())  # type: ignore[operator]


def test_children_are_their_parents_times_a_log_normal_factor() -> None:
    strategy = Generational(sigma=0.1, children=64, survivors=2)
    parents = {"a": jnp.stack([jnp.full(200, 1.0), jnp.full(200, 1000.0)])}
    state = strategy.init({"a": parents["a"][0]}, 1.0)
    state = type(state)(parents, state.losses, state.sigma)
    children = rows(strategy.ask(state, jax.random.key(0))[0])
    first = np.median(children, 1) < 30
    assert 0.2 < first.mean() < 0.8  # both parents have children
    steps = np.log(np.where(first[:, None], children, children / 1000))
    # 12,800 normal draws: deviations of mean and deviation are 0.0009 and 0.0006.
    assert abs(steps.mean()) < 0.005 and steps.std() == pytest.approx(0.1, rel=0.03)


def test_the_same_key_has_the_same_children_and_another_key_others() -> None:
    strategy = Generational()
    state = strategy.init(candidate(), 1.0)
    one, same, other = (rows(strategy.ask(state, jax.random.key(seed))[0]) for seed in (5, 5, 6))
    np.testing.assert_array_equal(one, same)
    assert not np.any(np.all(one == other, 1))


def test_steps_grow_on_success_and_shrink_on_failure() -> None:
    strategy = Generational(sigma=0.02, children=10, survivors=2)
    state = strategy.init(candidate(), 1.0)
    population, state = strategy.ask(state, jax.random.key(0))

    def sigma(losses: list[float]) -> float:
        return strategy.tell(state, population, np.array(losses)).sigma

    assert state.sigma == 0.02
    assert sigma([0.5] * 10) > sigma([0.5] * 3 + [2.0] * 7) > 0.02
    assert sigma([0.5] * 2 + [2.0] * 8) == pytest.approx(0.02)  # one fifth
    assert sigma([0.5] * 2 + [1.0] * 8) == pytest.approx(0.02)  # a tie is no success
    assert 0 < sigma([2.0] * 10) < sigma([0.5] + [2.0] * 9) < 0.02


def test_the_adapted_step_is_the_one_taken() -> None:
    strategy = Generational(sigma=0.02, children=200, survivors=1)
    start = {"a": np.ones(50, np.float32)}
    state = strategy.init(start, 1.0)
    population, state = strategy.ask(state, jax.random.key(0))
    state = strategy.tell(state, population, np.full(200, 2.0))
    children = rows(strategy.ask(state, jax.random.key(1))[0])
    assert np.log(children).std() == pytest.approx(0.02 * math.exp(-0.1), rel=0.03)


def test_a_tie_keeps_the_elder() -> None:
    strategy = Generational(children=3, survivors=2)
    state = strategy.init(candidate(), 1.0)
    population, state = strategy.ask(state, jax.random.key(0))
    state = strategy.tell(state, population, np.array([1.0, 1.0, 1.0]))
    np.testing.assert_array_equal(rows(state.parents), np.tile(flat(candidate()), (2, 1)))
    state = strategy.tell(state, population, np.array([0.5, 0.5, np.inf]))
    np.testing.assert_array_equal(rows(state.parents), rows(population)[:2])
    best, value = strategy.best(state)
    assert value == 0.5
    np.testing.assert_array_equal(flat(best), rows(population)[0])
