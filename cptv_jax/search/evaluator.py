"""The evaluator: losses of a whole population of candidates at one stage, from cached stage inputs."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from cptv_jax.forward import stage_inputs
from cptv_jax.stages import Stage, StageFunction

Loss = Callable[[PyTree, PyTree], Array]
Bind = Callable[[PyTree, PyTree], PyTree]


def _run_candidates(function: StageFunction, bind: Bind, state: PyTree, population: PyTree, x: PyTree) -> PyTree:
    return jax.vmap(lambda candidate: function(bind(state, candidate), x))(population)


def _run_shared(function: StageFunction, state: PyTree, x: PyTree) -> PyTree:
    return jax.vmap(lambda one: function(state, one))(x)


def _losses(loss: Loss, chunks: Sequence[PyTree], teacher: PyTree) -> Array:
    outputs = jax.tree.map(lambda *parts: jnp.concatenate(parts, 1), *chunks)
    return jax.vmap(lambda output: loss(output, teacher))(outputs)


class Evaluator:
    """Losses of candidates against a teacher, over batches of calibration images.

    stages: of the quantized model.
    batches: each a list of chunks, inputs to the first stage. A loss is computed over a whole batch, since the
        contrastive loss couples its images; the forward pass goes chunk by chunk. All chunks have one shape.
    teacher: the teacher's output for each whole batch.
    loss(output, teacher): a scalar, hashable as a function.
    width: how many candidates are computed at once. Activations take memory for width times a chunk, whatever the
        population and the number of images. A population is padded to a multiple of width, so that every call has
        one shape and each entry compiles once for all stages that compute alike.
    cache_bytes: bound on the prefix cache (one stage is always held).
    on_refresh(done, total): called after each batch while the cache is made.

    The prefix cache holds the inputs of stages, so that a candidate of stage b costs only stages b and later. It holds
    as many stages as fit, ending at the one in use, and is made anew when another is needed: a search that goes from
    the last stage to the first makes it once a pass where all of them fit. It is exact: it is dropped when a stage
    before a cached one changes.
    """

    def __init__(
        self,
        stages: Sequence[Stage],
        batches: Sequence[Sequence[PyTree]],
        teacher: Sequence[PyTree],
        loss: Loss,
        width: int = 1,
        cache_bytes: float = math.inf,
        on_refresh: Callable[[int, int], None] = lambda done, total: None,
    ) -> None:
        if not batches or len(batches) != len(teacher):
            raise ValueError(f"{len(batches)} batches and {len(teacher)} teacher outputs; they must match, and be some")
        self.stages = list(stages)
        self.batches = batches
        self.teacher = teacher
        self.loss = loss
        self.width = width
        # JAX keeps the programs of one function together, so evaluators of equal stages share them.
        self._run_candidates = jax.jit(_run_candidates, static_argnums=(0, 1))
        self._run_shared = jax.jit(_run_shared, static_argnums=0)
        self._run_losses = jax.jit(_losses, static_argnums=0)
        self.cache_bytes = cache_bytes
        self.on_refresh = on_refresh
        self._cached = range(0)  # stages whose inputs are held
        self._inputs: list[list[dict[int, PyTree]]] = []  # by batch, chunk, stage

    def _refresh(self, index: int) -> None:
        """Caches the inputs of stage `index` and of as many before it as fit."""
        self._inputs, self._cached = [], range(0)
        for done, chunks in enumerate(self.batches, 1):
            kept = []
            for chunk in chunks:
                inputs = stage_inputs(self.stages[:index], chunk)
                if not self._cached:
                    largest = max(sum(leaf.nbytes for leaf in jax.tree.leaves(x)) for x in inputs[1:] or inputs)
                    total = largest * sum(len(chunks) for chunks in self.batches)
                    count = min(index + 1, max(1, int(min(self.cache_bytes / total, len(self.stages)))))
                    self._cached = range(index + 1 - count, index + 1)
                kept.append({stage: inputs[stage] for stage in self._cached})
            self._inputs.append(kept)
            self.on_refresh(done, len(self.batches))

    def losses(self, index: int, population: PyTree) -> np.ndarray:
        """Losses [K], float64, of K candidates (leading axis of every leaf) at stage `index`; mean over the batches."""
        if index not in self._cached:
            self._refresh(index)
        count = jax.tree.leaves(population)[0].shape[0]
        pending = []
        for start in range(0, count, self.width):
            part = _padded_slice(population, start, self.width)
            for chunks, teacher in zip(self._inputs, self.teacher, strict=True):
                outputs = [self._outputs(index, part, inputs[index]) for inputs in chunks]
                pending.append((start, self._run_losses(self.loss, outputs, teacher)))
        # Summed in float64: the losses of candidates differ in their fifth digit.
        totals = np.zeros(count)
        for start, values in pending:
            totals[start : start + self.width] += np.asarray(values, np.float64)[: count - start]
        return totals / len(self.batches)

    def loss_of(self, index: int, candidate: PyTree) -> float:
        """Loss of a single candidate."""
        return float(self.losses(index, jax.tree.map(lambda leaf: jnp.asarray(leaf)[None], candidate))[0])

    def accept(self, index: int, candidate: PyTree) -> None:
        """Makes a candidate the stage's own; the cached inputs of later stages are dropped."""
        self.stages[index] = self.stages[index].bound(jax.tree.map(jnp.asarray, candidate))
        self._cached = range(self._cached.start, min(self._cached.stop, index + 1))

    def _outputs(self, index: int, part: PyTree, x: PyTree) -> PyTree:
        stage = self.stages[index]
        outputs = self._run_candidates(stage.function, stage.bind, stage.state, part, x)
        for later in self.stages[index + 1 :]:
            outputs = self._run_shared(later.function, later.state, outputs)
        return outputs

    def compile_counts(self) -> dict[str, int]:
        """How many programs each jitted entry holds, over all evaluators of the process, for tests of recompilation."""
        entries: dict[str, Any] = {
            "candidates": self._run_candidates,
            "shared": self._run_shared,
            "losses": self._run_losses,
        }
        return {name: entry._cache_size() for name, entry in entries.items()}


def _padded_slice(population: PyTree, start: int, width: int) -> PyTree:
    """`width` candidates from `start`, float32; beyond the end the last one is repeated."""

    def cut(leaf: Array) -> Array:
        rows = np.minimum(np.arange(start, start + width), leaf.shape[0] - 1)
        return jnp.asarray(leaf[rows], jnp.float32)

    return jax.tree.map(cut, population)
