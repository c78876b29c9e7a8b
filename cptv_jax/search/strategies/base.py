"""What the search asks of a strategy."""

from typing import Any, Protocol

import jax
import numpy as np
from jaxtyping import PyTree


class Strategy(Protocol):
    """Evolution of one stage's candidate. All methods are pure; the state is an opaque pytree.

    A candidate is a pytree of positive scales. Guided, which moves candidates by their stage's own steps, also takes
    what else a stage may have in it: zero points, biases, roundings.
    """

    @property
    def rounds(self) -> int:
        """How often ask and tell alternate at each stage."""

    def init(self, candidate: PyTree, loss: float) -> Any:
        """State that holds the stage's present candidate and its loss."""

    def ask(self, state: Any, key: jax.Array) -> PyTree:
        """Candidates to evaluate, stacked along a leading population axis. The key is this round's alone."""

    def tell(self, state: Any, population: PyTree, losses: np.ndarray) -> Any:
        """The state after the losses [K] of what was asked for. Equal losses keep the elder candidate."""

    def best(self, state: Any) -> tuple[PyTree, float]:
        """The survivor with the least loss, and that loss."""
