"""Evolution by generations: many children at once, steps in log-scale."""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

_TARGET_SUCCESS = 0.2  # Rechenberg's one-fifth rule


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class State:
    """parents: candidates [survivors, ...], best first; losses: [survivors]; sigma: step in log-scale."""

    parents: PyTree
    losses: Float[Array, " survivors"]
    sigma: Float[Array, ""]


@partial(jax.jit, static_argnums=2)
def _ask(state: State, key: Array, children: int) -> PyTree:
    choose, mutate = jax.random.split(key)
    parents = jax.random.randint(choose, (children,), 0, state.losses.shape[0])
    leaves, structure = jax.tree.flatten(state.parents)
    keys = jax.random.split(mutate, len(leaves))
    return jax.tree.unflatten(
        structure,
        [
            leaf[parents] * jnp.exp(state.sigma * jax.random.normal(k, (children, *leaf.shape[1:])))
            for k, leaf in zip(keys, leaves, strict=True)
        ],
    )


@jax.jit
def _tell(state: State, population: PyTree, losses: Array) -> State:
    success = jnp.mean(losses < state.losses[0])
    every = jnp.concatenate([state.losses, losses])
    order = jnp.argsort(every, stable=True)[: state.losses.shape[0]]
    parents = jax.tree.map(lambda old, new: jnp.concatenate([old, new])[order], state.parents, population)
    return State(parents, every[order], state.sigma * jnp.exp((success - _TARGET_SUCCESS) / 2))


@dataclass(frozen=True)
class Generational:
    """A (survivors + children) evolution strategy.

    Children multiply a random survivor's scales by exp(sigma * normal), so scales stay positive and a step means the
    same at every bit width. sigma grows when more than a fifth of the children beat the best parent, else it shrinks.
    """

    sigma: float = 0.01
    children: int = 8
    survivors: int = 2
    rounds: int = 3

    def init(self, candidate: PyTree, loss: float) -> State:
        parents = jax.tree.map(lambda leaf: jnp.repeat(jnp.asarray(leaf)[None], self.survivors, 0), candidate)
        return State(parents, jnp.full(self.survivors, loss, jnp.float32), jnp.float32(self.sigma))

    def ask(self, state: State, key: Array) -> PyTree:
        return _ask(state, key, self.children)

    def tell(self, state: State, population: PyTree, losses: np.ndarray) -> State:
        return _tell(state, population, jnp.asarray(losses, jnp.float32))

    def best(self, state: State) -> tuple[PyTree, float]:
        return jax.tree.map(lambda members: members[0], state.parents), float(state.losses[0])
