"""The published evolution, step for step."""

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import jax
import numpy as np
from jaxtyping import PyTree
from pydantic import Field

from cptv_jax.options import options
from cptv_jax.search.strategies.base import NO_CONTEXT, StageContext, Strategy


def published_step(bits: int) -> float:
    """Looks up the published half-width of the uniform mutation.

    Args:
        bits: Width of the weights.

    Returns:
        The half-width in input units: 1e-4 for 8-bit weights, else 1e-3 (published for 3 and 4 bits).
    """
    return 1e-4 if bits == 8 else 1e-3


@dataclass(frozen=True)
class Draws:
    """The random numbers of one cycle.

    Attributes:
        samples: Indices [samples] into the population, with replacement.
        perturbation: Absolute steps, in the structure of a candidate.
    """

    samples: np.ndarray
    perturbation: PyTree


@dataclass(frozen=True)
class State:
    """Where the evolution stands.

    Attributes:
        candidates: Pytree with a leading axis of length `population`.
        losses: [population], float64, ascending.
        step: Half-width of the mutation.
    """

    candidates: PyTree
    losses: np.ndarray
    step: float


@options
class EvolQ(Strategy):
    """The published search: tournament selection with one mutated child per round (CPT-V, algorithm 1; Evol-Q's code).

    The population starts as copies of the stage's candidate. Each round draws `samples` members with replacement, adds
    a uniform step in [-step, step] to the best of them, takes absolute values, and replaces the worst member.
    Scales are kept in float64, as published, and rounded to float32 when they are evaluated.

    Example:
        >>> config = QuantizeConfig(search=SearchConfig(strategy=EvolQ(passes=4)))
    """

    name: ClassVar[str] = "evol-q"
    passes: int = Field(default=10, ge=1)
    """Sweeps over the blocks, last block first."""
    rounds: int = Field(default=3, ge=1)
    """Rounds of mutation per block and pass."""
    population: int = Field(default=15, ge=1)
    """How many candidates survive."""
    samples: int = Field(default=10, ge=1)
    """How many of them compete to be the parent of a round."""
    step: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """Half-width of the mutation, in input units; null means 1e-4 for 8-bit weights and 1e-3 otherwise."""

    def init(self, candidate: PyTree, loss: float, context: StageContext = NO_CONTEXT) -> State:
        """Begins at a stage.

        Args:
            candidate: The stage's present candidate.
            loss: Its loss.
            context: Further facts about the stage.

        Returns:
            The state.
        """

        def copies(leaf: Any) -> np.ndarray:
            return np.repeat(np.asarray(leaf, np.float64)[None], self.population, 0)

        # The last width where they differ, as the published code asks the projection's.
        step = published_step(context.widths[-1] if context.widths else 0) if self.step is None else self.step
        return State(jax.tree.map(copies, candidate), np.full(self.population, loss, np.float64), step)

    def draw(self, state: State, key: jax.Array) -> Draws:
        """Draws the random numbers of a cycle.

        Args:
            state: The state, for the shapes and the half-width.
            key: The cycle's key.

        Returns:
            The sampled indices and the perturbation.
        """
        choose, mutate = jax.random.split(key)
        leaves, structure = jax.tree.flatten(state.candidates)
        keys = jax.random.split(mutate, len(leaves))
        steps = [
            np.asarray(jax.random.uniform(k, leaf.shape[1:], minval=-state.step, maxval=state.step), np.float64)
            for k, leaf in zip(keys, leaves, strict=True)
        ]
        samples = np.asarray(jax.random.randint(choose, (self.samples,), 0, self.population))
        return Draws(samples, jax.tree.unflatten(structure, steps))

    def parent(self, state: State, draws: Draws) -> int:
        """Selects the parent of a cycle.

        Args:
            state: The state.
            draws: The cycle's random numbers.

        Returns:
            Index of the sampled member with the least loss; among equals, of the one that stands first in the
            population.
        """
        return int(min(draws.samples, key=lambda index: (state.losses[index], index)))

    def mutate(self, state: State, draws: Draws) -> PyTree:
        """Makes the child of a cycle.

        Args:
            state: The state.
            draws: The cycle's random numbers.

        Returns:
            The child as a population of one, in float64.
        """
        parent = self.parent(state, draws)
        return jax.tree.map(
            lambda members, delta: np.abs(members[parent] + delta)[None], state.candidates, draws.perturbation
        )

    def ask(self, state: State, key: jax.Array) -> tuple[PyTree, State]:
        """Proposes one mutated child of the tournament's winner.

        Args:
            state: The state.
            key: This round's key.

        Returns:
            The candidates [K, ...] to evaluate, and the state to pass to `tell`.
        """
        return self.mutate(state, self.draw(state, key)), state

    def tell(self, state: State, population: PyTree, losses: np.ndarray) -> State:
        """Replaces the worst member by the child if the child is better.

        Args:
            state: The state that `ask` returned.
            population: The candidates [K, ...].
            losses: Their losses [K], float64.

        Returns:
            The state.
        """
        order = np.argsort(np.append(state.losses, losses), kind="stable")[: self.population]
        candidates = jax.tree.map(lambda old, new: np.concatenate([old, new])[order], state.candidates, population)
        return replace(state, candidates=candidates, losses=np.append(state.losses, losses)[order])

    def best(self, state: State) -> tuple[PyTree, float]:
        """Returns the candidate with the least loss so far.

        Args:
            state: The state.

        Returns:
            The candidate, and its loss.
        """
        winner = int(np.argmin(state.losses))
        return jax.tree.map(lambda members: members[winner].astype(np.float32), state.candidates), float(
            state.losses[winner]
        )
