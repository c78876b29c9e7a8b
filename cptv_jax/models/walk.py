"""One pass over the stages of a model, with any interpreter.

Code that reads a model stage by stage (calibration, layer-wise methods) defines a `Visit`: the interpreter that a stage
runs with and the findings that are wanted from it. The walk compiles each kind of stage once for each kind of visit.
"""

from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Protocol

import jax
from flax import nnx
from jaxtyping import PyTree

from cptv_jax.interpreters import FakeQuant, Operations
from cptv_jax.models.architecture import Architecture, Weights, call_stage, stage_graphs

Run = Callable[[Operations, PyTree], PyTree]
"""Runs a stage: from an interpreter and the stage's input to its output."""


class Visit(Hashable, Protocol):
    """The work that is done at a stage, without its arrays.

    A frozen dataclass, whose fields are hashable and name sites relative to the stage: equal visits of stages that are
    built alike share one compiled program.

    Example:
        >>> @dataclass(frozen=True)
        ... class Capture:
        ...     wanted: tuple[str, ...]
        ...
        ...     def __call__(self, run, x, arrays):
        ...         ops = Capturing({}, self.wanted)
        ...         return run(ops, x), ops.inputs
    """

    def __call__(self, run: Run, x: PyTree, arrays: PyTree) -> tuple[PyTree, PyTree]:
        """Runs the stage.

        Args:
            run: Runs the stage, given an interpreter and an input.
            x: The stage's input.
            arrays: Other arrays that the visit reads, such as quantizers.

        Returns:
            The stage's output and the visit's findings, two pytrees of arrays.
        """


@dataclass(frozen=True)
class Plain:
    """Runs a stage in float with all tokens, also those that no later stage reads, and finds nothing.

    Published methods calibrate on all tokens.
    """

    def __call__(self, run: Run, x: PyTree, arrays: PyTree) -> tuple[PyTree, PyTree]:
        """Returns the stage's output, and None for findings; see `Visit.__call__`."""
        return run(FakeQuant({}, all_tokens=True), x), None


def _visit(graph: nnx.GraphDef[Any], visit: Visit, weights: PyTree, x: PyTree, arrays: PyTree) -> tuple[PyTree, PyTree]:
    return visit(lambda ops, x: call_stage(graph, ops, weights, x), x, arrays)


_compiled_visit = jax.jit(_visit, static_argnums=(0, 1))


def visit_stage(
    architecture: Architecture, weights: Weights, stage: str, visit: Visit, x: PyTree, arrays: PyTree = None
) -> tuple[PyTree, PyTree]:
    """Visits one stage, by a program that all equal visits of equal stages share.

    Args:
        architecture: The model's architecture.
        weights: The model's weights, by stage.
        stage: The stage's name.
        visit: The work to do there.
        x: The stage's input.
        arrays: Other arrays that the visit reads.

    Returns:
        The stage's output and the visit's findings.
    """
    return _compiled_visit(stage_graphs(architecture)[stage], visit, weights[stage], x, arrays)


def walk(
    architecture: Architecture,
    weights: Weights,
    x: PyTree,
    visits: Mapping[str, Visit],
    arrays: Mapping[str, PyTree] = MappingProxyType({}),
    inputs: Mapping[str, PyTree] = MappingProxyType({}),
) -> Iterator[tuple[str, PyTree, PyTree]]:
    """Visits every stage of a model in order, each on the output of the one before it.

    One stage is in memory at a time, in addition to what the caller keeps.

    Args:
        architecture: The model's architecture.
        weights: The model's weights, by stage.
        x: The input of the first stage: a Tensor of images [batch, height, width, channels].
        visits: By stage, the work to do there.
        arrays: By stage, other arrays that its visit reads.
        inputs: By stage, an input that replaces the output of the stage before it.

    Yields:
        A stage's name, its output, and the visit's findings.
    """
    for stage in stage_graphs(architecture):
        x, found = visit_stage(architecture, weights, stage, visits[stage], inputs.get(stage, x), arrays.get(stage))
        yield stage, x, found


def run_stages(architecture: Architecture, weights: Weights, ops: Operations, x: PyTree) -> PyTree:
    """Runs every stage with one interpreter, uncompiled, to be part of a larger program.

    Args:
        architecture: The model's architecture.
        weights: The model's weights, by stage.
        ops: The interpreter.
        x: A Tensor of images [batch, height, width, channels].

    Returns:
        The output of the last stage.
    """
    for stage, graph in stage_graphs(architecture).items():
        x = call_stage(graph, ops, weights[stage], x)
    return x
