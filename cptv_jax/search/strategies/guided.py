"""Evolution along a direction: children that go further or back on a proposal, mix with what was before, or mutate."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from cptv_jax.search.strategies.generational import TARGET_SUCCESS

_KINDS = 5  # of children: along the direction, elements taken back, random, along by parameter, parameters taken back
_RANDOM = 2
_STRIDE = 0.5  # deviation of how far a child goes along the direction, in lengths of it

Move = Callable[[PyTree, PyTree], PyTree]


@dataclass(frozen=True)
class State:
    """parent, loss: the best candidate so far. sigma: deviation of random steps (see Stage.move)."""

    parent: PyTree
    loss: float
    sigma: float


@partial(jax.jit, static_argnums=(0, 5))
def _children(move: Move, parent: PyTree, direction: PyTree, sigma: Float[Array, ""], key: Array, count: int) -> PyTree:
    leaves, structure = jax.tree.flatten(direction)

    def child(index: Array, key: Array) -> PyTree:
        key, stride_key = jax.random.split(key)
        stride = _STRIDE * jax.random.normal(stride_key)
        steps = []
        for leaf, leaf_key in zip(leaves, jax.random.split(key, len(leaves)), strict=True):
            back = -leaf * jax.random.bernoulli(leaf_key, 0.5, leaf.shape)
            noise = sigma * jax.random.normal(leaf_key, leaf.shape)
            own = _STRIDE * jax.random.normal(leaf_key) * leaf
            whole = -leaf * jax.random.bernoulli(leaf_key)
            steps.append(jnp.stack([stride * leaf, back, noise, own, whole])[index % _KINDS])
        return move(parent, jax.tree.unflatten(structure, steps))

    return jax.vmap(child)(jnp.arange(count), jax.random.split(key, count))


@dataclass(frozen=True)
class Guided:
    """A (1 + children) evolution strategy around a proposed direction.

    Of every five children one goes further or back along the direction, one takes back a random half of it (crossover
    with the candidate that the proposal started from), and one takes a random step; the fourth goes along the direction
    by a length of its own for each parameter of each site, and the fifth takes some of these back whole. sigma follows
    the success of the random ones (one-fifth rule).

    direction: steps of the candidate's structure, which led to it. move: the stage's. sigma: the deviation to start
    with, such as the last stage's.
    """

    direction: PyTree
    move: Move
    sigma: float = 0.01
    children: int = 3
    rounds: int = 1

    def init(self, candidate: PyTree, loss: float) -> State:
        return State(jax.tree.map(jnp.asarray, candidate), loss, self.sigma)

    def ask(self, state: State, key: Array) -> PyTree:
        return _children(self.move, state.parent, self.direction, jnp.float32(state.sigma), key, self.children)

    def tell(self, state: State, population: PyTree, losses: np.ndarray) -> State:
        random = losses[_RANDOM::_KINDS]
        success = float(np.mean(random < state.loss)) if len(random) else TARGET_SUCCESS
        state = replace(state, sigma=state.sigma * math.exp((success - TARGET_SUCCESS) / 2))
        winner = int(np.argmin(losses))
        if losses[winner] >= state.loss:
            return state
        return replace(state, parent=jax.tree.map(lambda leaf: leaf[winner], population), loss=float(losses[winner]))

    def best(self, state: State) -> tuple[PyTree, float]:
        return state.parent, state.loss
