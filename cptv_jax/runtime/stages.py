"""Stages: all that the search knows of a model."""

from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace
from typing import Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Output:
    """What a model's last stage returns: penultimate features [batch, features] and logits [batch, classes]."""

    features: Float[Array, "batch features"]
    logits: Float[Array, "batch classes"]


class StageFunction(Hashable, Protocol):
    """The computation of a stage, without its arrays.

    Two stages that compute alike must have equal functions (a frozen dataclass, or the same plain function): equal
    functions share one compiled program.
    """

    def __call__(self, state: PyTree, x: PyTree) -> PyTree:
        """The stage's output for one batch, from its state (weights, quantizers) and its input."""


def scale_by(candidate: PyTree, steps: PyTree) -> PyTree:
    """Every leaf multiplied by the exponential of its step."""
    return jax.tree.map(lambda scale, step: scale * jnp.exp(step), candidate, steps)


@dataclass(frozen=True)
class Stage:
    """An addressable piece of a forward pass.

    name: such as "blocks.3".
    function: pure; state and input are pytrees of arrays.
    state: everything that the function reads beside its input.
    candidate: the part of the state that a search may change (by site, a scale), or an empty pytree.
    bind: places a candidate in a state; pure, so it can be vmapped over a population.
    move: a candidate moved by steps of its own structure and shapes, of which a zero moves nothing and a small one
        changes a little, alike for every parameter: scales by default are multiplied by the step's exponential.
    """

    name: str
    function: StageFunction
    state: PyTree
    candidate: PyTree = None
    bind: Callable[[PyTree, PyTree], PyTree] = lambda state, candidate: state
    move: Callable[[PyTree, PyTree], PyTree] = scale_by

    @property
    def searchable(self) -> bool:
        return bool(jax.tree.leaves(self.candidate))

    def with_candidate(self, candidate: PyTree) -> "Stage":
        """This stage with the candidate in place."""
        return replace(self, state=self.bind(self.state, candidate), candidate=candidate)
