"""Early rejection: candidates that fall behind on some of the batches are not evaluated on the others."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from cptv_jax.search.evaluator import Evaluator


def _rungs(batches: int) -> list[tuple[int, int]]:
    """Half-open ranges of batches that end at 1, 2, 4 and so on, and at all of them."""
    ends = [2**i for i in range(batches.bit_length()) if 2**i < batches] + [batches]
    return list(zip([0, *ends[:-1]], ends, strict=True))


class RacingEvaluator(Evaluator):
    """An evaluator that races candidates by successive halving (Jamieson and Talwalkar 2016).

    All candidates are evaluated on one batch, the better half of them on the second, and so on at every doubling; one
    whose mean is above that of the present scales on the same batches is dropped at once. Dropped candidates have an
    infinite loss. The losses of survivors are those of Evaluator.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._seen: list[np.ndarray] = []  # losses [K, batches] of each call since the last accept
        self._reference: np.ndarray | None = None  # losses by batch of the present scales

    def losses(self, index: int, population: PyTree) -> np.ndarray:
        """Races a population and computes the losses of its survivors.

        Args:
            index: The stage that the candidates belong to.
            population: K candidates, along the leading axis of every leaf.

        Returns:
            Losses [K], float64; infinity for candidates that were dropped.
        """
        if self._reference is None:
            present = jax.tree.map(lambda leaf: jnp.asarray(leaf)[None], self.stages[index].candidate)
            self._reference = self.batch_losses(index, present)[0]
        count = jax.tree.leaves(population)[0].shape[0]
        alive, seen = np.arange(count), np.zeros((count, len(self.batches)))
        for first, last in _rungs(len(self.batches)):
            part = jax.tree.map(lambda leaf, rows=alive: leaf[rows], population)
            seen[alive, first:last] = self.batch_losses(index, part, first, last)
            if last == len(self.batches):
                break
            means = seen[alive, :last].mean(1)
            order = np.argsort(means, kind="stable")[: -(-len(alive) // 2)]
            alive = alive[np.sort(order[means[order] <= self._reference[:last].mean()])]
            if not len(alive):
                break
        losses = np.full(count, np.inf)
        losses[alive] = seen[alive].mean(1)
        self._seen.append(seen)
        return losses

    def accept(self, index: int, candidate: PyTree, found: tuple[int, int] | None = None) -> None:
        """Installs a candidate in its stage, as `Evaluator.accept` does.

        Args:
            index: The stage that the candidate belongs to.
            candidate: The candidate, which must have survived the race.
            found: Where it was evaluated (see `Evaluator.accept`).
        """
        super().accept(index, candidate)
        self._reference = None if found is None else self._seen[-found[0]][found[1]]
        self._seen = []
