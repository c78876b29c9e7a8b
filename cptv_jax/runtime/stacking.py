"""Runs of consecutive stages that compute alike, so that one program can loop over them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from cptv_jax.runtime.stages import Stage, StageFunction


@dataclass(frozen=True)
class Run:
    """Consecutive stages that compute alike.

    Attributes:
        function: Their common computation.
        bind: Their common `Stage.bind`.
        move: Their common `Stage.move`.
        length: How many there are.
    """

    function: StageFunction
    bind: Callable[[PyTree, PyTree], PyTree]
    move: Callable[[PyTree, PyTree], PyTree]
    length: int

    def state(self, states: PyTree, index: Array | int) -> PyTree:
        """Selects the state of one stage.

        Args:
            states: The states, stacked along a leading axis; a run of one stage holds its state as it is.
            index: The stage's position in the run; may be traced.

        Returns:
            The state.
        """
        if self.length == 1:
            return states
        return jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, index, keepdims=False), states)

    def apply(self, states: PyTree, start: Array | int, x: PyTree) -> PyTree:
        """Runs the stages from one of them to the last.

        Args:
            states: The states, stacked along a leading axis; a run of one stage holds its state as it is.
            start: The position of the first stage to run; may be traced.
            x: Its inputs [K, ...], one for each of K candidates.

        Returns:
            The outputs of the last stage [K, ...].
        """

        def step(index: Array | int, x: PyTree) -> PyTree:
            state = self.state(states, index)
            return jax.vmap(lambda one: self.function(state, one))(x)

        if self.length == 1:
            return step(0, x)
        return jax.lax.fori_loop(start, self.length, step, x)


def _are_alike(a: Stage, b: Stage) -> bool:
    def shapes(stage: Stage) -> Any:
        return jax.tree.map(lambda leaf: (jnp.shape(leaf), jnp.result_type(leaf)), (stage.state, stage.candidate))

    return (a.function, a.bind, a.move) == (b.function, b.bind, b.move) and shapes(a) == shapes(b)


def runs_of(stages: Sequence[Stage]) -> tuple[list[Run], list[tuple[int, int]]]:
    """Groups consecutive stages that compute alike.

    Args:
        stages: The stages, in order.

    Returns:
        The runs, and for each stage the position of its run and its own position in the run.
    """
    runs: list[Run] = []
    home: list[tuple[int, int]] = []
    for i, stage in enumerate(stages):
        length = runs[-1].length + 1 if i and _are_alike(stages[i - 1], stage) else 1
        runs[len(runs) - (length > 1) :] = [Run(stage.function, stage.bind, stage.move, length)]
        home.append((len(runs) - 1, length - 1))
    return runs, home


def stack(trees: Sequence[PyTree]) -> PyTree:
    """Stacks the trees of a run's stages.

    Args:
        trees: One pytree of arrays per stage, all of one structure.

    Returns:
        One pytree whose leaves have a leading axis; for a single stage its own tree, without that axis.
    """
    return trees[0] if len(trees) == 1 else jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)
