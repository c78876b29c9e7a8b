"""Running stages one after the other, each compiled once per stage function."""

from collections.abc import Callable, Sequence
from functools import cache

import jax
from jaxtyping import PyTree

from cptv_jax.mesh import compiler_options
from cptv_jax.stages import Stage, StageFunction


def _run(function: StageFunction, state: PyTree, x: PyTree) -> PyTree:
    return function(state, x)


@cache
def _program() -> Callable[..., PyTree]:
    return jax.jit(_run, static_argnums=0, compiler_options=compiler_options())


def apply_stage(function: StageFunction, state: PyTree, x: PyTree) -> PyTree:
    """The stage's output for one batch, by a program that all equal functions share."""
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
