"""Runs stages one after the other, each compiled once per stage function."""

from collections.abc import Callable, Iterator, Sequence
from functools import cache, lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, PyTree

from cptv_jax.interpreters.tensor import Tensor
from cptv_jax.runtime.mesh import DATA, compiler_options, gather, images_per_device, make_mesh, place
from cptv_jax.runtime.stages import Output, Stage, StageFunction


def _run(function: StageFunction, state: PyTree, x: PyTree) -> PyTree:
    return function(state, x)


@cache
def _program() -> Any:
    return jax.jit(_run, static_argnums=0, compiler_options=compiler_options())


def apply_stage(function: StageFunction, state: PyTree, x: PyTree) -> PyTree:
    """Runs one stage on one batch, by a program that all equal functions share.

    Args:
        function: The stage's computation.
        state: Its state.
        x: Its input. Under a trace the function is called directly and becomes part of the larger program.

    Returns:
        The stage's output.
    """
    if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(x)):
        return function(state, x)  # the larger program has its own compiler options
    return _program()(function, state, x)


def forward(stages: Sequence[Stage], x: PyTree) -> PyTree:
    """Runs all stages on one batch.

    Args:
        stages: The stages, in order.
        x: The input of the first stage, such as images [batch, height, width, channels], float32.

    Returns:
        The output of the last stage; for a whole model an `Output`.

    Example:
        >>> logits = forward(model.stages(), images.normalize(0, 8)).logits
        >>> logits.shape
        (8, 1000)
    """
    for stage in stages:
        x = apply_stage(stage.function, stage.state, x)
    return x


def stage_inputs(stages: Sequence[Stage], x: PyTree) -> list[PyTree]:
    """Computes the input of every stage for one batch.

    Args:
        stages: The stages, in order.
        x: The input of the first stage.

    Returns:
        The inputs in the order of the stages, followed by the output of the last stage.
    """
    inputs = [x]
    for stage in stages:
        inputs.append(apply_stage(stage.function, stage.state, inputs[-1]))
    return inputs


def array_of(output: PyTree) -> Float[Array, "batch ..."]:
    """Extracts the array of a stage's output that is compared.

    Args:
        output: An `Output`, a `Tensor` or an array.

    Returns:
        The logits of an `Output`, the values of a `Tensor`, an array itself.
    """
    if isinstance(output, Output):
        return output.logits
    return output.values if isinstance(output, Tensor) else output


def activation_bytes(stages: Sequence[Stage], x: PyTree) -> int:
    """Estimates the memory that the activations of one image take: twice what the largest operation reads and writes.

    Traces the stages and runs nothing.

    Args:
        stages: The stages, in order.
        x: The input of the first stage for a batch of one, arrays or their shapes.

    Returns:
        Bytes.
    """
    largest = 0
    for stage in stages:
        leaves, structure = jax.tree.flatten((stage.state, x))
        shapes = tuple(jax.ShapeDtypeStruct(jnp.shape(leaf), jnp.result_type(leaf)) for leaf in leaves)
        size, x = _largest_operation(stage.function, structure, shapes)
        largest = max(largest, size)
    return 2 * largest


@lru_cache(maxsize=64)
def _largest_operation(
    function: StageFunction, structure: Any, shapes: tuple[jax.ShapeDtypeStruct, ...]
) -> tuple[int, PyTree]:
    """Returns the bytes that a stage's largest operation reads and writes, and the shapes of its output.

    The result is cached: the blocks of a model are alike, one model is asked about many times, and a trace takes as
    long as a round of a small search.
    """
    jaxpr, output = jax.make_jaxpr(function, return_shape=True)(*jax.tree.unflatten(structure, shapes))
    operations = ((*equation.invars, *equation.outvars) for equation in jaxpr.jaxpr.eqns)
    return max((sum(v.aval.size * v.aval.dtype.itemsize for v in values) for values in operations), default=0), output


def cut_into_pieces(read: Callable[[int, int], np.ndarray], count: int, size: int) -> Iterator[tuple[np.ndarray, int]]:
    """Cuts images into pieces of one size; the last is padded by repeating its last image.

    Args:
        read: Gives the images from a start to a stop position, [stop - start, ...].
        count: How many images there are.
        size: Images per piece.

    Yields:
        A piece [size, ...] and how many of its images count, in order.
    """
    for start in range(0, count, size):
        piece = read(start, min(start + size, count))
        padding = np.repeat(piece[-1:], size - len(piece), 0)
        yield (np.concatenate([piece, padding]) if len(padding) else piece), len(piece)


def compute_outputs(
    stages: Sequence[Stage],
    read: Callable[[int, int], np.ndarray],
    count: int,
    mesh: Mesh | None = None,
    budget: float | None = None,
    on_progress: Callable[[int], None] = lambda images: None,
) -> PyTree:
    """Computes the output of the last stage for many images, in pieces of one shape, on all devices.

    Args:
        stages: The stages, in order.
        read: Gives the inputs of the first stage from a start to a stop position, [stop - start, ...].
        count: How many images there are.
        mesh: The devices; None takes all of them.
        budget: Bytes for activations on each device; None asks the device (see `mesh.images_per_device`).
        on_progress: Called with the number of images that were completed since the last call.

    Returns:
        The output for all images, NumPy arrays [count, ...] on the host.
    """
    mesh = mesh or make_mesh()
    one = read(0, 1)
    each = images_per_device(mesh, activation_bytes(stages, jax.eval_shape(jnp.asarray, one)), count, budget)
    size = each * mesh.shape[DATA]
    placed = [Stage(s.name, s.function, place(mesh, s.state)) for s in stages]
    parts = []
    for piece, real in cut_into_pieces(read, count, size):
        output = gather(mesh, forward(placed, place(mesh, piece, DATA)))
        parts.append(jax.tree.map(lambda leaf, real=real: leaf[:real], output))
        on_progress(real)
    return jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts)
