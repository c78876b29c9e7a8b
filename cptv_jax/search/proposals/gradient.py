"""Gradient steps on the candidates of a whole model: they propose where to go, and the evaluator decides."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, PyTree

from cptv_jax.runtime.mesh import DATA, compiler_options, place
from cptv_jax.runtime.optimizers import adam_by_tensor
from cptv_jax.runtime.stacking import Run, runs_of, stack
from cptv_jax.runtime.stages import Stage
from cptv_jax.search.proposals.base import Listener, Progress, Proposal, Scales
from cptv_jax.search.proposals.matching import TEACHER

Loss = Callable[[PyTree], Array]
_SAVED_EVERY, _LOGGED_EVERY = 50, 25  # steps
_KEPT = jax.checkpoint_policies.save_only_these_names(TEACHER)


@dataclass(frozen=True)
class Descent:
    """Adam on the steps of candidates (see `Stage.move`), with a rate that falls along a half cosine over all passes.

    Attributes:
        steps: Optimizer steps per pass.
        rate: Rate at the start; a step of 0.01 is one percent of a scale.
        batch: Images per step, which the devices share.
        passes: How many passes share the schedule; each begins with fresh moments, so that no state of the optimizer
            outlives a pass.
        mixup: Whether to mix images (see `mixed`).
    """

    steps: int
    rate: float
    batch: int
    passes: int
    mixup: bool = False

    def rate_at(self, step: Array | int) -> Array:
        """Computes the rate of a step.

        Args:
            step: The step, counted from the first pass on.

        Returns:
            The rate.
        """
        return self.rate * 0.5 * (1.0 + jnp.cos(math.pi * jnp.minimum(step / (self.steps * self.passes), 1.0)))


_ADAM = adam_by_tensor()


def _loss(
    runs: tuple[Run, ...],
    loss: Loss,
    batch: int,
    states: Sequence[PyTree],
    candidates: Sequence[PyTree],
    steps: Sequence[PyTree],
    x: PyTree,
) -> Array:
    """Computes the loss of a batch with the candidates moved by steps.

    x: its images in pieces [pieces, images, ...]; images beyond `batch` only make the pieces equal. Only the inputs of
    stages (and a teacher's outputs) are kept; the activations within are computed again, piece by piece, for the
    derivative.
    """
    for run, *trees in zip(runs, states, candidates, steps, strict=True):

        def stage(x: PyTree, trees: Sequence[PyTree], run: Run = run) -> tuple[PyTree, None]:
            state, candidate, step = trees
            bound = run.bind(state, run.move(candidate, step))
            return jax.lax.map(jax.checkpoint(lambda piece: run.function(bound, piece), policy=_KEPT), x), None

        x, _ = stage(x, trees) if run.length == 1 else jax.lax.scan(stage, x, trees)
    return loss(jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:])[:batch], x))


def _descend(
    runs: tuple[Run, ...],
    loss: Loss,
    batch: int,
    states: Sequence[PyTree],
    candidates: Sequence[PyTree],
    steps: Sequence[PyTree],
    moments: PyTree,
    rate: Array,
    x: PyTree,
) -> tuple[Sequence[PyTree], PyTree, Array]:
    """One step of Adam: the new steps and moments, and the loss before."""
    value, gradients = jax.value_and_grad(_loss, 5)(runs, loss, batch, states, candidates, steps, x)
    found = _by_stage(runs, _ADAM.update, gradients, moments)
    moved = jax.tree.map(lambda step, update: step - rate * update, steps, [updates for updates, _ in found])
    return moved, [kept for _, kept in found], value


def _by_stage(runs: tuple[Run, ...], function: Callable[..., Any], *trees: Sequence[PyTree]) -> list[Any]:
    """Applies a function to each stage's own part of the trees, by run; the results are stacked as the trees are."""
    return [
        function(*of_run) if run.length == 1 else jax.vmap(function, axis_size=run.length)(*of_run)
        for run, *of_run in zip(runs, *trees, strict=True)
    ]


@cache
def _descend_program() -> Any:
    return jax.jit(_descend, static_argnums=(0, 1, 2), compiler_options=compiler_options())


def _random(key: Array, *numbers: int) -> np.random.Generator:
    return np.random.default_rng([*np.asarray(jax.random.key_data(key)), *numbers])


def _batches(count: int, size: int, steps: int, key: Array) -> Iterator[np.ndarray]:
    """Indices of the images of every step: all images in a new order, again and again."""
    rng = _random(key)
    order = np.zeros(0, int)
    for _ in range(steps):
        if len(order) < size:
            order = np.resize(rng.permutation(count), max(size, count))  # few images are repeated
        yield order[:size]
        order = order[size:]


def mixed(
    images: Float[np.ndarray, "batch height width channels"], rng: np.random.Generator
) -> Float[np.ndarray, "batch height width channels"]:
    """Mixes each image with another one of the batch in random proportions (mixup, arXiv 1710.09412).

    A teacher can label them too, and there are more mixtures than images (arXiv 2106.05237).

    Args:
        images: Normalised images [batch, height, width, channels].
        rng: Source of the proportions and the pairs.

    Returns:
        Mixed images [batch, height, width, channels].
    """
    share = rng.uniform(size=(len(images), 1, 1, 1)).astype(np.float32)
    return share * images + (1 - share) * images[rng.permutation(len(images))]


def _pieces(batch: int, limit: int, devices: int) -> tuple[int, int]:
    """Divides a batch: the number of pieces, and the number of images that each has room for.

    Each device gets whole images, and a piece no more than the limit if the number of devices allows it.
    """
    pieces = math.ceil(batch / (max(1, limit // devices) * devices))
    return pieces, math.ceil(batch / (pieces * devices)) * devices


class GradientProposer:
    """Proposes steps for the candidates of all stages at once.

    Args:
        stages: Differentiable stages, with candidates like those of the evaluator.
        read: read(indices) returns images for the first stage.
        count: How many images there are to read.
        loss: Loss of the last stage's output for a batch.
        descent: The optimizer.
        at_once: How many images are computed at once, on all devices together.
        mesh: Divides these images among its data axis.
    """

    def __init__(
        self,
        stages: Sequence[Stage],
        read: Callable[[np.ndarray], np.ndarray],
        count: int,
        loss: Loss,
        descent: Descent,
        at_once: int,
        mesh: Mesh,
    ) -> None:
        runs, self._home = runs_of(stages)
        self._runs = tuple(runs)
        self._names = [stage.name for stage in stages]
        self._candidates = [stage.candidate for stage in stages]
        self._states = place(mesh, self._stacked([stage.state for stage in stages]))
        self.read, self.count, self.loss, self.descent, self.mesh = read, count, loss, descent, mesh
        self.batch = min(descent.batch, count)
        self.pieces = _pieces(self.batch, at_once, mesh.shape[DATA])

    def _stacked(self, trees: Sequence[PyTree]) -> list[PyTree]:
        """Trees of all stages, by run."""
        by_run = zip(self._home, trees, strict=True)
        members: list[list[PyTree]] = [[] for _ in self._runs]
        for (run, _), tree in by_run:
            members[run].append(tree)
        return [stack(of_run) for of_run in members]

    every_pass = True

    @property
    def steps(self) -> int:
        """Optimizer steps per pass."""
        return self.descent.steps

    def propose(
        self,
        scales: Scales,
        pass_index: int,
        key: Array,
        progress: Progress | None = None,
        listener: Listener = Listener(),  # noqa: B008 - immutable
    ) -> Proposal:
        """Proposes the steps that a pass of descent arrives at (see `Proposer.propose`).

        Args:
            scales: The candidates to start from, by stage.
            pass_index: The pass, from 0 on, which decides the rate.
            key: Key of the order of the images and of the mixup draws.
            progress: The last progress that the listener received, to continue from there with the same bits.
            listener: Receives the loss of every batch and, now and then, the progress.

        Returns:
            Steps by stage, and the mean loss of every 25 batches on the way.
        """
        present = [scales.get(name, own) for name, own in zip(self._names, self._candidates, strict=True)]
        candidates = place(self.mesh, self._stacked(jax.tree.map(jnp.asarray, present)))
        steps = jax.tree.map(jnp.zeros_like, candidates)
        moments = place(self.mesh, _by_stage(self._runs, _ADAM.init, steps))
        begin, losses = 0, []
        if progress:
            begin, losses = int(progress["done"]), [float(loss) for loss in progress["losses"]]
            steps, moments = place(self.mesh, self._restored((steps, moments), progress))
        batches = _batches(self.count, self.batch, self.descent.steps, key)
        for number, rows in enumerate(batches):
            if number < begin:
                continue
            if number > begin and number % _SAVED_EVERY == 0:
                sofar = {"done": np.int32(number), "losses": np.asarray(losses, np.float32)}
                listener.on_progress({**sofar, **self._saved((steps, moments))})
            rate = self.descent.rate_at(pass_index * self.descent.steps + number)
            images = self.read(rows)
            if self.descent.mixup:
                images = mixed(images, _random(key, number))
            filled = np.resize(images, (math.prod(self.pieces), *images.shape[1:]))
            x = place(self.mesh, filled.reshape(*self.pieces, *images.shape[1:]), DATA, 1)
            steps, moments, value = _descend_program()(
                self._runs, self.loss, self.batch, self._states, candidates, steps, moments, rate, x
            )
            losses.append(float(value))
            listener.on_step(f"gradient, batch loss {losses[-1]:.5f}", 1)
        found = {
            name: self._member(steps, home, place_in_run)
            for name, (home, place_in_run) in zip(self._names, self._home, strict=True)
            if name in scales
        }
        means = [float(np.mean(losses[i : i + _LOGGED_EVERY])) for i in range(0, len(losses), _LOGGED_EVERY)]
        return Proposal(found, tuple(means))

    def _labels(self, trees: tuple[PyTree, PyTree]) -> list[str]:
        """A name for each leaf of steps and moments: what it is, the first stage of its run, and where it lies there.

        The state of the optimizer lists a count, means and squares.
        """
        firsts = [self._names[[run for run, _ in self._home].index(number)] for number in range(len(self._runs))]
        labels = []
        for kind, tree in zip(("step", "moment"), trees, strict=True):
            for (run, *path), _ in jax.tree_util.tree_leaves_with_path(tree):
                inner = jax.tree_util.keystr(tuple(path), simple=True, separator=".")
                labels.append(f"{kind}.{firsts[run.idx]}.{inner}")
        return labels

    def _saved(self, trees: tuple[PyTree, PyTree]) -> dict[str, np.ndarray]:
        return dict(zip(self._labels(trees), map(np.asarray, jax.tree.leaves(trees)), strict=True))

    def _restored(self, like: tuple[PyTree, PyTree], saved: Mapping[str, PyTree]) -> tuple[PyTree, PyTree]:
        leaves = [jnp.asarray(saved[label]) for label in self._labels(like)]
        found: tuple[PyTree, PyTree] = jax.tree.unflatten(jax.tree.structure(like), leaves)
        return found

    def _member(self, trees: Sequence[PyTree], home: int, index: int) -> PyTree:
        if self._runs[home].length == 1:
            return trees[home]
        return jax.tree.map(lambda leaf: leaf[index], trees[home])
