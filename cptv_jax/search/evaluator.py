"""The evaluator: losses of a whole population of candidates at one stage, from cached stage inputs."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from cptv_jax.forward import apply_stage, stage_inputs
from cptv_jax.stages import Stage, StageFunction

Loss = Callable[[PyTree, PyTree], Array]
Bind = Callable[[PyTree, PyTree], PyTree]


def _run_candidates(function: StageFunction, bind: Bind, state: PyTree, population: PyTree, x: PyTree) -> PyTree:
    return jax.vmap(lambda candidate: function(bind(state, candidate), x))(population)


def _run_shared(function: StageFunction, state: PyTree, x: PyTree) -> PyTree:
    return jax.vmap(lambda one: function(state, one))(x)


def _losses(loss: Loss, outputs: PyTree, teacher: PyTree) -> Array:
    return jax.vmap(lambda output: loss(output, teacher))(outputs)


class Evaluator:
    """Losses of candidates against a teacher, over batches of calibration images.

    stages: of the quantized model. batches: inputs to the first stage, all of one shape, since the contrastive loss
    couples the images of a batch. teacher: the teacher's output for each batch. loss(output, teacher): a scalar.
    width: how many candidates are computed at once. Memory for activations grows with width times the batch, and no
    further with the population or the number of images; a population is padded to a multiple of width, so every call
    has one shape and compiles once.

    The inputs of every stage are cached (the prefix cache). A candidate of stage b then costs only stages b and later.
    The cache stays exact while stages are changed from the last to the first; `refresh` makes it anew.
    """

    def __init__(
        self,
        stages: Sequence[Stage],
        batches: Sequence[PyTree],
        teacher: Sequence[PyTree],
        loss: Loss,
        width: int = 1,
    ) -> None:
        if not batches or len(batches) != len(teacher):
            raise ValueError(f"{len(batches)} batches and {len(teacher)} teacher outputs; they must match, and be some")
        self.stages = list(stages)
        self.batches = list(batches)
        self.teacher = list(teacher)
        self.loss = loss
        self.width = width
        # Own jit wrappers, so that their compile counts are this search's.
        self.run_candidates = jax.jit(_run_candidates, static_argnums=(0, 1))
        self.run_shared = jax.jit(_run_shared, static_argnums=0)
        self.run_losses = jax.jit(_losses, static_argnums=0)
        self.inputs: list[list[PyTree]] = []
        self._exact_to = -1

    def refresh(self, upto: int | None = None, on_progress: Callable[[int, int], None] = lambda i, n: None) -> None:
        """Recomputes the cached inputs of stages 0 to `upto` (default: all) under the current states."""
        last = len(self.stages) - 1 if upto is None else upto
        self.inputs = []
        for index, batch in enumerate(self.batches):
            self.inputs.append(stage_inputs(self.stages[:last], batch))
            on_progress(index + 1, len(self.batches))
        self._exact_to = last

    def losses(self, index: int, population: PyTree) -> np.ndarray:
        """Losses [K], float64, of K candidates (leading axis of every leaf) at stage `index`; mean over the batches.

        Raises ValueError when an earlier stage has changed since the cache was made.
        """
        if index > self._exact_to:
            raise ValueError(f"stage {index} lies behind a stage that changed since the last refresh; call refresh()")
        count = jax.tree.leaves(population)[0].shape[0]
        # Sums in float64 on the host: single losses differ in their fifth digit.
        totals = np.zeros(count)
        pending = []
        for start in range(0, count, self.width):
            part = _padded_slice(population, start, self.width)
            for inputs, teacher in zip(self.inputs, self.teacher, strict=True):
                pending.append((start, self._batch_losses(index, part, inputs[index], teacher)))
        for start, values in pending:
            stop = min(start + self.width, count)
            totals[start:stop] += np.asarray(values, np.float64)[: stop - start]
        return totals / len(self.batches)

    def loss_of(self, index: int, candidate: PyTree) -> float:
        """Loss of a single candidate."""
        return float(self.losses(index, jax.tree.map(lambda leaf: jnp.asarray(leaf)[None], candidate))[0])

    def accept(self, index: int, candidate: PyTree) -> None:
        """Makes a candidate the stage's own; cached inputs of later stages are no longer valid."""
        self.stages[index] = self.stages[index].bound(jax.tree.map(jnp.asarray, candidate))
        self._exact_to = min(self._exact_to, index)

    def _batch_losses(self, index: int, part: PyTree, x: PyTree, teacher: PyTree) -> Array:
        stage = self.stages[index]
        outputs = self.run_candidates(stage.function, stage.bind, stage.state, part, x)
        for later in self.stages[index + 1 :]:
            outputs = self.run_shared(later.function, later.state, outputs)
        return self.run_losses(self.loss, outputs, teacher)

    def compile_counts(self) -> dict[str, int]:
        """How many programs each jitted entry holds, for tests of recompilation."""
        entries: dict[str, Any] = {
            "candidates": self.run_candidates,
            "shared": self.run_shared,
            "losses": self.run_losses,
        }
        return {name: entry._cache_size() for name, entry in entries.items()}


def _padded_slice(population: PyTree, start: int, width: int) -> PyTree:
    """`width` candidates from `start`; beyond the end the last one is repeated."""

    def cut(leaf: Array) -> Array:
        rows = jnp.minimum(jnp.arange(start, start + width), leaf.shape[0] - 1)
        return jnp.asarray(leaf, jnp.float32)[rows]

    return jax.tree.map(cut, population)


def teacher_outputs(stages: Sequence[Stage], batches: Sequence[PyTree]) -> list[PyTree]:
    """The teacher's output for each batch."""
    outputs = []
    for batch in batches:
        x = batch
        for stage in stages:
            x = apply_stage(stage.function, stage.state, x)
        outputs.append(x)
    return outputs


def with_states(stages: Sequence[Stage], states: Sequence[PyTree]) -> list[Stage]:
    """The same stages with other states."""
    return [replace(stage, state=state) for stage, state in zip(stages, states, strict=True)]
