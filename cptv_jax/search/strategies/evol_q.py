"""The published evolution, step for step."""

from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree


def published_step(bits: int) -> float:
    """Half-width of the uniform mutation, in input units: 1e-4 for 8-bit weights, else 1e-3 (published for 3 and 4)."""
    return 1e-4 if bits == 8 else 1e-3


@dataclass(frozen=True)
class Draws:
    """The random numbers of one cycle.

    samples: [samples] indices into the population, with replacement. perturbation: like a candidate, absolute.
    """

    samples: np.ndarray
    perturbation: PyTree


@dataclass(frozen=True)
class State:
    """candidates: pytree with a leading axis of length `population`; losses: [population], float64, ascending."""

    candidates: PyTree
    losses: np.ndarray


@dataclass(frozen=True)
class EvolQ:
    """Tournament selection with one mutated child a cycle (CPT-V, algorithm 1; Evol-Q's code).

    The population starts as copies of the stage's candidate. Each cycle draws `samples` members with replacement, adds
    a uniform step in [-step, step] to the best of them, takes absolute values, and replaces the worst member.
    Scales are kept in float64, as published, and rounded to float32 when they are evaluated.
    """

    step: float = 1e-3
    population: int = 15
    samples: int = 10
    rounds: int = 3

    def init(self, candidate: PyTree, loss: float) -> State:
        def copies(leaf: Any) -> np.ndarray:
            return np.repeat(np.asarray(leaf, np.float64)[None], self.population, 0)

        return State(jax.tree.map(copies, candidate), np.full(self.population, loss, np.float64))

    def draw(self, state: State, key: jax.Array) -> Draws:
        """The cycle's random numbers from its key."""
        choose, mutate = jax.random.split(key)
        leaves, structure = jax.tree.flatten(state.candidates)
        keys = jax.random.split(mutate, len(leaves))
        steps = [
            np.asarray(jax.random.uniform(k, leaf.shape[1:], minval=-self.step, maxval=self.step), np.float64)
            for k, leaf in zip(keys, leaves, strict=True)
        ]
        samples = np.asarray(jax.random.randint(choose, (self.samples,), 0, self.population))
        return Draws(samples, jax.tree.unflatten(structure, steps))

    def parent(self, state: State, draws: Draws) -> int:
        """The sampled member with the least loss; of equals, the one that stands first in the population."""
        return int(min(draws.samples, key=lambda index: (state.losses[index], index)))

    def mutate(self, state: State, draws: Draws) -> PyTree:
        """The cycle's child, as a population of one, in float64."""
        parent = self.parent(state, draws)
        return jax.tree.map(
            lambda members, delta: np.abs(members[parent] + delta)[None], state.candidates, draws.perturbation
        )

    def ask(self, state: State, key: jax.Array) -> PyTree:
        return self.mutate(state, self.draw(state, key))

    def tell(self, state: State, population: PyTree, losses: np.ndarray) -> State:
        order = np.argsort(np.append(state.losses, losses), kind="stable")[: self.population]
        candidates = jax.tree.map(lambda old, new: np.concatenate([old, new])[order], state.candidates, population)
        return replace(state, candidates=candidates, losses=np.append(state.losses, losses)[order])

    def best(self, state: State) -> tuple[PyTree, float]:
        winner = int(np.argmin(state.losses))
        return jax.tree.map(lambda members: members[winner].astype(np.float32), state.candidates), float(
            state.losses[winner]
        )
