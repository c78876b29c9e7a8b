"""Searches of the toy, and what may be said of how they end."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from cptv_jax.runtime.forward import forward
from cptv_jax.runtime.stages import Stage
from cptv_jax.search import Evaluator, EvolQ, Evosax, Generational, Objective, Proposer, Strategy
from cptv_jax.search.loop import Hooks, Search, run_search
from cptv_jax.search.state import SearchState, initial_state

Subject = Any  # tests/search/conftest.py
STRATEGIES: dict[str, Strategy] = {
    "evol-q": EvolQ(step=0.05, population=6, samples=4, rounds=3, passes=2),
    "generational": Generational(sigma=0.1, children=3, survivors=2, rounds=2, passes=2),
    "evosax": Evosax(sigma=0.1, children=4, rounds=2, passes=2),
}
LOSS = Objective("mse")


def search(
    evaluator: Evaluator,
    strategy: str | Strategy = "generational",
    passes: int = 2,
    seed: int = 0,
    state: SearchState | None = None,
    held_out: Any = None,
    proposers: Sequence[Proposer] = (),
    patience: int | None = None,
    **hooks: Any,
) -> SearchState:
    begin = initial_state(evaluator) if state is None else state
    chosen: Any = STRATEGIES[strategy] if isinstance(strategy, str) else strategy
    what = Search(dataclasses.replace(chosen, passes=passes), jax.random.key(seed), proposers, held_out, patience)
    return run_search(evaluator, what, begin, Hooks(**hooks))


def fake_held_out(values: Sequence[float]) -> Callable[[Sequence[Stage]], float]:
    """Held-out losses as given: of the start, of pass 1, and so on."""
    remaining = iter(values)
    return lambda stages: next(remaining)


def assert_same(a: SearchState, b: SearchState) -> None:
    """Equal in every bit of every field."""
    for field in dataclasses.fields(SearchState):
        x, y = getattr(a, field.name), getattr(b, field.name)
        if field.name in ("scales", "best_scales", "direction"):
            assert jax.tree.structure(x) == jax.tree.structure(y)  # type: ignore[operator]
            for one, other in zip(jax.tree.leaves(x), jax.tree.leaves(y), strict=True):
                assert np.asarray(one).dtype == np.asarray(other).dtype == np.float32
                np.testing.assert_array_equal(np.asarray(one), np.asarray(other))
        else:
            assert x == y, field.name


def true_held_out(toy: Subject) -> Callable[[Sequence[Stage]], float]:
    """MSE on the toy's images in reverse: a function of the stages alone."""
    images = toy.images[::-1].copy()
    target = forward(toy.teacher_stages, images)
    return lambda stages: float(LOSS(forward(stages, images), target))
