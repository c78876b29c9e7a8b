"""Stages: the only view of a model that the search has."""

from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace
from typing import Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Output:
    """The output of a model's last stage.

    Attributes:
        features: Penultimate features, float32 [batch, features].
        logits: Float32 [batch, classes].

    Example:
        >>> output = forward(model.stages(), images.normalize(0, 8))
        >>> output.logits.shape
        (8, 1000)
    """

    features: Float[Array, "batch features"]
    logits: Float[Array, "batch classes"]


class StageFunction(Hashable, Protocol):
    """The computation of a stage, without its arrays.

    Two stages that compute alike must have equal functions (a frozen dataclass, or the same plain function): equal
    functions share one compiled program.
    """

    def __call__(self, state: PyTree, x: PyTree) -> PyTree:
        """Computes the stage's output for one batch.

        Args:
            state: The stage's arrays (weights, quantizers).
            x: Its input.

        Returns:
            Its output.
        """


def scale_by(candidate: PyTree, steps: PyTree) -> PyTree:
    """Multiplies every leaf of a candidate by the exponential of its step.

    Args:
        candidate: Scales.
        steps: A pytree of the same structure; a step of 0 changes nothing.

    Returns:
        The new candidate.
    """
    return jax.tree.map(lambda scale, step: scale * jnp.exp(step), candidate, steps)


@dataclass(frozen=True)
class Stage:
    """An addressable piece of a forward pass.

    Attributes:
        name: Such as "blocks.3".
        function: The computation, pure; state and input are pytrees of arrays.
        state: Everything that the function reads in addition to its input.
        candidate: The part of the state that a search may change (by site, a scale), or an empty pytree.
        bind: Places a candidate in a state; pure, so that it can be vmapped over a population.
        move: Moves a candidate by steps of its own structure and shapes. A step of zero moves nothing, and a small step
            changes every parameter by a similar amount; by default scales are multiplied by the step's exponential.

    Example:
        >>> double = Stage("double", lambda state, x: state * x, state=jnp.float32(2))
        >>> float(forward([double, double], jnp.float32(3)))
        12.0
    """

    name: str
    function: StageFunction
    state: PyTree
    candidate: PyTree = None
    bind: Callable[[PyTree, PyTree], PyTree] = lambda state, candidate: state
    move: Callable[[PyTree, PyTree], PyTree] = scale_by

    @property
    def searchable(self) -> bool:
        """Whether a search has anything to change here."""
        return bool(jax.tree.leaves(self.candidate))

    def with_candidate(self, candidate: PyTree) -> "Stage":
        """Returns this stage with a candidate in place.

        Args:
            candidate: The candidate, of the structure of this stage's own.

        Returns:
            A new stage; this one stays as it is.
        """
        return replace(self, state=self.bind(self.state, candidate), candidate=candidate)
