"""Running stages one after the other, each compiled once per stage function."""

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
    """The stage's output for one batch, by a program that all equal functions share."""
    if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(x)):
        return function(state, x)  # part of a larger program, which has its own options
    return _program()(function, state, x)


def forward(stages: Sequence[Stage], x: PyTree) -> PyTree:
    """The output of the last stage for one batch of inputs to the first."""
    for stage in stages:
        x = apply_stage(stage.function, stage.state, x)
    return x


def stage_inputs(stages: Sequence[Stage], x: PyTree) -> list[PyTree]:
    """The input of every stage, and after them the output of the last, for one batch."""
    inputs = [x]
    for stage in stages:
        inputs.append(apply_stage(stage.function, stage.state, inputs[-1]))
    return inputs


def array_of(output: PyTree) -> Float[Array, "batch ..."]:
    """What of a stage's output is compared: the values of a tensor, the logits of a model's output."""
    if isinstance(output, Output):
        return output.logits
    return output.values if isinstance(output, Tensor) else output


def activation_bytes(stages: Sequence[Stage], x: PyTree) -> int:
    """An estimate of the memory that one image takes on its way: twice what the largest operation reads and writes.

    x: the input of the first stage for a batch of one, arrays or their shapes. Traces the stages, runs nothing.
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
    """Bytes that a stage's largest operation reads and writes, and the shapes of its output.

    Kept, as the blocks of a model are alike and one model is asked about again and again, while a trace takes as long
    as a small search's round.
    """
    jaxpr, output = jax.make_jaxpr(function, return_shape=True)(*jax.tree.unflatten(structure, shapes))
    operations = ((*equation.invars, *equation.outvars) for equation in jaxpr.jaxpr.eqns)
    return max((sum(v.aval.size * v.aval.dtype.itemsize for v in values) for values in operations), default=0), output


def cut_into_pieces(read: Callable[[int, int], np.ndarray], count: int, size: int) -> Iterator[tuple[np.ndarray, int]]:
    """Images [size, ...] in order with how many of them count; the last piece is padded by repeating its last image.

    read(start, stop): the images themselves.
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
    """The output of the last stage for `count` images, on the host, computed in pieces of one shape on all devices.

    read(start, stop): inputs of the first stage. budget: bytes for activations on each device; see images_per_device.
    on_progress(images): called with the number of images that are newly done.
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
