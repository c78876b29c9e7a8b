"""Evolution by generations: many children at once, steps in log-scale."""

import math
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree
from pydantic import Field

from cptv_jax.options import options
from cptv_jax.search.strategies.base import NO_CONTEXT, StageContext, Strategy

TARGET_SUCCESS = 0.2  # Rechenberg's one-fifth rule


@dataclass(frozen=True)
class State:
    """Where the evolution stands.

    Attributes:
        parents: Candidates [survivors, ...], best first.
        losses: Their losses [survivors], float64.
        sigma: Deviation of the steps, in log-scale.
    """

    parents: PyTree
    losses: np.ndarray
    sigma: float


@partial(jax.jit, static_argnums=3)
def _children(parents: PyTree, sigma: Float[Array, ""], key: Array, count: int) -> PyTree:
    choose, mutate = jax.random.split(key)
    leaves, structure = jax.tree.flatten(parents)
    chosen = jax.random.randint(choose, (count,), 0, leaves[0].shape[0])
    keys = jax.random.split(mutate, len(leaves))
    return jax.tree.unflatten(
        structure,
        [
            leaf[chosen] * jnp.exp(sigma * jax.random.normal(k, (count, *leaf.shape[1:])))
            for k, leaf in zip(keys, leaves, strict=True)
        ],
    )


@jax.jit
def _select(parents: PyTree, children: PyTree, order: Array) -> PyTree:
    return jax.tree.map(lambda old, new: jnp.concatenate([old, new])[order], parents, children)


@options
class Generational(Strategy):
    """Evolution by generations: many children at once, steps in log-scale.

    A (survivors + children) evolution strategy. Children multiply a random survivor's scales by exp(sigma * normal), so
    scales stay positive and a step means the same at every bit width. sigma grows when more than a fifth of the
    children beat the best parent, else it shrinks.

    Example:
        >>> config = QuantizeConfig(search=SearchConfig(strategy=Generational(children=16)))
    """

    name: ClassVar[str] = "generational"
    passes: int = Field(default=10, ge=1)
    """Sweeps over the blocks, last block first."""
    rounds: int = Field(default=3, ge=1)
    """Generations per block and pass."""
    children: int = Field(default=8, ge=1)
    """Candidates per generation."""
    survivors: int = Field(default=2, ge=1)
    """How many of the children and their parents become the next parents."""
    sigma: float = Field(default=0.01, gt=0, allow_inf_nan=False)
    """Deviation of the steps at first, in log-scale."""

    @property
    def candidates(self) -> int:
        """The number of children in a generation."""
        return self.children

    def init(self, candidate: PyTree, loss: float, context: StageContext = NO_CONTEXT) -> State:
        """Begins at a stage.

        Args:
            candidate: The stage's present candidate.
            loss: Its loss.
            context: Further facts about the stage.

        Returns:
            The state.
        """
        parents = jax.tree.map(lambda leaf: jnp.repeat(jnp.asarray(leaf)[None], self.survivors, 0), candidate)
        return State(parents, np.full(self.survivors, loss), self.sigma)

    def ask(self, state: State, key: Array) -> tuple[PyTree, State]:
        """Proposes mutated children of random survivors.

        Args:
            state: The state.
            key: This round's key.

        Returns:
            The candidates [K, ...] to evaluate, and the state to pass to `tell`.
        """
        return _children(state.parents, jnp.float32(state.sigma), key, self.children), state

    def tell(self, state: State, population: PyTree, losses: np.ndarray) -> State:
        """Selects the survivors and adapts the deviation.

        Args:
            state: The state that `ask` returned.
            population: The candidates [K, ...].
            losses: Their losses [K], float64.

        Returns:
            The state.
        """
        success = float(np.mean(losses < state.losses[0]))
        every = np.concatenate([state.losses, losses])
        order = np.argsort(every, kind="stable")[: self.survivors]
        sigma = state.sigma * math.exp((success - TARGET_SUCCESS) / 2)
        return State(_select(state.parents, population, jnp.asarray(order)), every[order], sigma)

    def best(self, state: State) -> tuple[PyTree, float]:
        """Returns the candidate with the least loss so far.

        Args:
            state: The state.

        Returns:
            The candidate, and its loss.
        """
        return jax.tree.map(lambda members: members[0], state.parents), float(state.losses[0])
