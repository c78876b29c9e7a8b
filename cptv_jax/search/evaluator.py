"""The evaluator: losses of a whole population of candidates at one stage, from cached stage inputs."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, PyTree

from cptv_jax.runtime.forward import cut_into_pieces, stage_inputs
from cptv_jax.runtime.mesh import DATA, POPULATION, compiler_options, make_mesh, place, replicated_sharding
from cptv_jax.runtime.stacking import Run, runs_of, stack
from cptv_jax.runtime.stages import Stage

Loss = Callable[[PyTree, PyTree], Array]


def _generation(
    home: Run,
    tail: tuple[Run, ...],
    states: PyTree,
    index: Array,
    population: PyTree,
    later: Sequence[PyTree],
    x: PyTree,
) -> PyTree:
    """Outputs [K, images, ...] of K candidates of the stage `index` of run `home`, through all later stages.

    All candidates read the same input x, so the layers under search multiply it by the weights of all of them at once;
    further on, a population is a batch. One program serves every stage of the run.
    """
    state = home.state(states, index)
    y = jax.vmap(lambda candidate: home.function(home.bind(state, candidate), x))(population)
    if home.length > 1:
        y = home.apply(states, index + 1, y)
    for run, states in zip(tail, later, strict=True):
        y = run.apply(states, 0, y)
    return y


def _losses(loss: Loss, whole: NamedSharding, first: int, parts: Sequence[PyTree], teacher: Sequence[PyTree]) -> Array:
    """Losses [K, batches] of outputs [K, images, ...], given in parts. teacher: outputs [batch, ...] of each batch.

    first: the image at which the first batch begins.
    """
    # Every device sees everything, so that sums are taken in one order whatever the mesh.
    outputs = jax.lax.with_sharding_constraint(jax.tree.map(lambda *leaves: jnp.concatenate(leaves, 1), *parts), whole)
    count = jax.tree.leaves(outputs)[0].shape[0]
    if count == 1:  # XLA makes no loop of one round, and sums of another order of what was its body
        outputs = jax.tree.map(lambda leaf: jnp.concatenate([leaf, leaf]), outputs)
    losses = []
    for target in teacher:
        size = jax.tree.leaves(target)[0].shape[0]
        batch = jax.tree.map(lambda leaf, a=first, b=first + size: leaf[:, a:b], outputs)
        # One candidate after the other: an objective's float sums then do not depend on how many there are.
        losses.append(jax.lax.map(lambda output, target=target: loss(output, target), batch))
        first += size
    return jnp.stack(losses, 1)[:count]


# JAX keeps the programs of one function together, so evaluators of equal stages share them.
@cache
def _generation_program() -> Any:
    return jax.jit(_generation, static_argnums=(0, 1), compiler_options=compiler_options())


@cache
def _losses_program() -> Any:
    return jax.jit(_losses, static_argnums=(0, 1, 2))


class Evaluator:
    """Losses of candidates against a teacher, over batches of calibration images.

    The prefix cache holds the inputs of stages, so that a candidate of stage b costs only stages b and later. It holds
    as many stages as fit, ending at the one in use, and is computed again when another is needed: a search that goes
    from the last stage to the first computes it once per pass if all of them fit. It is exact: it is dropped when a
    stage before a cached one changes. In a fully quantized model it holds uint8 codes.

    Args:
        stages: The stages of the quantized model.
        batches: Inputs of the first stage, [batch, ...] each, on the host. A loss is computed over a whole batch, since
            the contrastive loss couples its images; the forward pass goes piece by piece.
        teacher: The teacher's output for each batch.
        loss: loss(output, teacher) returns a scalar; hashable as a function.
        images: How many images are computed at once, on all devices together.
        width: How many candidates are computed at once. Activations take memory for width times images, whatever the
            population and the number of images. A population is padded to a multiple of width, so that every call has
            one shape.
        mesh: Divides candidates among its population axis and images among its data axis; None takes all devices for
            the images. Losses do not depend on it.
        cache_bytes: Bound on the prefix cache (one stage is always held).
        on_refresh: on_refresh(done, total) is called as the cache is computed.

    Raises:
        ValueError: If there is no batch, or not one teacher output per batch.

    Example:
        >>> evaluator = Evaluator(quantized.stages(), batches, teacher_outputs, Objective("infonce"))
        >>> losses = evaluator.losses(11, population)
    """

    def __init__(
        self,
        stages: Sequence[Stage],
        batches: Sequence[np.ndarray],
        teacher: Sequence[PyTree],
        loss: Loss,
        images: int | None = None,
        width: int = 1,
        mesh: Mesh | None = None,
        cache_bytes: float = math.inf,
        on_refresh: Callable[[int, int], None] = lambda done, total: None,
    ) -> None:
        if not batches or len(batches) != len(teacher):
            raise ValueError(
                f"{len(batches)} batches and {len(teacher)} teacher outputs; expected as many, and at least one"
            )
        self.mesh = mesh or make_mesh()
        self.batches = [np.asarray(batch) for batch in batches]
        self._bounds = np.cumsum([0, *map(len, self.batches)])  # the first image of each batch, and the number of all
        self.images = _round_up(min(images or self._count, self._count), self.mesh.shape[DATA])
        self.width = _round_up(width, self.mesh.shape[POPULATION])
        self.teacher = place(self.mesh, list(teacher))
        self.loss = loss
        self.cache_bytes = cache_bytes
        self.on_refresh = on_refresh
        self.stages = [self._placed(stage) for stage in stages]
        self._runs, self._home = runs_of(self.stages)
        self._states = [self._stacked(run) for run in range(len(self._runs))]
        self._cached = range(0)  # stages whose inputs are held
        self._inputs: list[dict[int, PyTree]] = []  # by piece, stage

    def _placed(self, stage: Stage) -> Stage:
        return replace(stage, state=place(self.mesh, stage.state))

    def _stacked(self, run: int) -> PyTree:
        return stack([stage.state for stage, (home, _) in zip(self.stages, self._home, strict=True) if home == run])

    @property
    def _count(self) -> int:
        return int(self._bounds[-1])

    def _read(self, start: int, stop: int) -> np.ndarray:
        """Images across the borders of batches."""
        first = int(np.searchsorted(self._bounds, start, "right")) - 1
        last = int(np.searchsorted(self._bounds, stop, "left"))
        joined = self.batches[first] if last == first + 1 else np.concatenate(self.batches[first:last])
        return joined[start - self._bounds[first] : stop - self._bounds[first]]

    def _refresh(self, index: int) -> None:
        """Caches the inputs of stage `index` and of as many before it as fit."""
        self._inputs, self._cached = [], range(0)
        count = -(-self._count // self.images)
        for done, (piece, _) in enumerate(cut_into_pieces(self._read, self._count, self.images), 1):
            inputs = stage_inputs(self.stages[:index], place(self.mesh, piece, DATA))
            if not self._cached:
                largest = max(sum(leaf.nbytes for leaf in jax.tree.leaves(x)) for x in inputs[1:] or inputs)
                fit = min(index + 1, max(1, int(min(self.cache_bytes / (largest * count), len(self.stages)))))
                self._cached = range(index + 1 - fit, index + 1)
            self._inputs.append({stage: inputs[stage] for stage in self._cached})
            jax.block_until_ready(inputs)  # else inputs that are not kept pile up
            self.on_refresh(done, count)

    def batch_losses(self, index: int, population: PyTree, first: int = 0, last: int | None = None) -> np.ndarray:
        """Computes the losses of a population, batch by batch.

        Args:
            index: The stage that the candidates belong to.
            population: K candidates, along the leading axis of every leaf.
            first: The first batch to evaluate on.
            last: The end of the batches to evaluate on, exclusive; None means all.

        Returns:
            Losses [K, batches], float64.
        """
        last = len(self.batches) if last is None else last
        if index not in self._cached:
            self._refresh(index)
        home, position = self._home[index]
        tail = tuple(self._runs[home + 1 :])
        count = jax.tree.leaves(population)[0].shape[0]
        begin, end = int(self._bounds[first]), int(self._bounds[last])
        used = range(begin // self.images, -(-end // self.images))
        offset, losses = begin - used.start * self.images, []
        for start in range(0, count, self.width):
            part = place(self.mesh, _padded_slice(population, start, self.width), POPULATION)
            parts = [
                _generation_program()(
                    self._runs[home],
                    tail,
                    self._states[home],
                    jnp.int32(position),
                    part,
                    self._states[home + 1 :],
                    self._inputs[piece][index],
                )
                for piece in used
            ]
            # Devices exchange outputs for the losses. XLA's CPU devices share one pool of threads, and one that waits
            # for the other's part can hold the thread that the other needs, so nothing else may be under way.
            jax.block_until_ready(parts)
            whole = replicated_sharding(self.mesh)
            losses.append(np.asarray(_losses_program()(self.loss, whole, offset, parts, self.teacher[first:last])))
        return np.concatenate(losses).astype(np.float64)[:count]

    def losses(self, index: int, population: PyTree) -> np.ndarray:
        """Computes the losses of a population, mean over the batches.

        The mean is taken in float64: the losses of candidates differ in their fifth digit.

        Args:
            index: The stage that the candidates belong to.
            population: K candidates, along the leading axis of every leaf.

        Returns:
            Losses [K], float64.
        """
        return self.batch_losses(index, population).mean(1)

    def loss_of(self, index: int, candidate: PyTree) -> float:
        """Computes the loss of a single candidate.

        Args:
            index: The stage that the candidate belongs to.
            candidate: The candidate.

        Returns:
            Its loss, mean over the batches.
        """
        return float(self.losses(index, jax.tree.map(lambda leaf: jnp.asarray(leaf)[None], candidate))[0])

    def accept(self, index: int, candidate: PyTree, found: tuple[int, int] | None = None) -> None:
        """Installs a candidate in its stage and drops the cached inputs of later stages.

        Args:
            index: The stage that the candidate belongs to.
            candidate: The candidate.
            found: Where it was evaluated: how many calls of `losses` ago (1 is the last), and in which row; None if it
                was not evaluated since the last call of `accept`.
        """
        self.stages[index] = self._placed(
            self.stages[index].with_candidate(place(self.mesh, jax.tree.map(jnp.asarray, candidate)))
        )
        self._states[self._home[index][0]] = self._stacked(self._home[index][0])
        self._cached = range(self._cached.start, min(self._cached.stop, index + 1))

    def compile_counts(self) -> dict[str, int]:
        """Counts the compiled programs, over all evaluators of the process, for tests of recompilation.

        Returns:
            The number of programs by jitted function, "generation" and "losses".
        """
        return {"generation": _generation_program()._cache_size(), "losses": _losses_program()._cache_size()}


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def _padded_slice(population: PyTree, start: int, width: int) -> PyTree:
    """`width` candidates from `start`, float32; beyond the end the last one is repeated."""

    def cut(leaf: Array) -> Array:
        rows = np.minimum(np.arange(start, start + width), leaf.shape[0] - 1)
        return jnp.asarray(leaf[rows], jnp.float32)

    return jax.tree.map(cut, population)
