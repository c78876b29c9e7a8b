"""What single linear layers and matmuls read, produce and matter for, in the float model, layer by layer.

All tokens count, also those in the last block that nothing reads: published methods calibrate on them.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, PyTree

from cptv_jax.interpreters import Capturing, FakeQuant, Tensor
from cptv_jax.models.architecture import call_stage, sites_of, stage_graphs
from cptv_jax.quantized.model import Model
from cptv_jax.recipe.sites import Site
from cptv_jax.runtime.stages import Output


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Samples:
    """One operation's arrays for some images.

    operands: of a linear layer its input [images, ..., inputs], of a matmul both operands [images, heads, rows, inner]
        and [images, heads, inner, columns]. output: what it produced. gradient: of the loss with respect to the
        output, or None.
    """

    operands: tuple[Float[Array, "..."], ...]
    output: Float[Array, "..."]
    gradient: Float[Array, "..."] | None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Operation:
    """A linear layer, output = x @ kernel + bias, or (kernel None) a matmul, output = factor * a @ b.

    weight: of a linear layer kernel [inputs, outputs] and bias [outputs] or None.
    """

    weight: tuple[Float[Array, "inputs outputs"], Float[Array, " outputs"] | None] | None
    factor: Float[Array, ""]


@dataclass(frozen=True)
class Layer:
    """A linear layer or matmul of the float model with all that happened at it.

    name: such as blocks.0.attn.qkv. sites: of its two operands: input and weight, or both inputs.
    samples: chunk by chunk of images.
    """

    name: str
    sites: tuple[str, str]
    operation: Operation
    samples: list[Samples] = field(repr=False)

    @property
    def is_linear(self) -> bool:
        return self.operation.weight is not None


def _operand_sites(site: Site) -> tuple[str, str]:
    """The sites of both operands of a weight's or a matmul's operation."""
    a, b = site.reads if site.kind == "matmul" else (*site.reads, site.name)
    return a, b


def _layer_name(site: Site) -> str:
    return site.name.removesuffix(".weight")


def _capture(
    graph: nnx.GraphDef[Any], name: str, weights: PyTree, x: PyTree, cotangent: PyTree
) -> tuple[Samples, Array]:
    """Samples of one operation, and the factor of a matmul. cotangent: of the stage's output, or None."""

    def run(offsets: dict[str, Array]) -> tuple[PyTree, Capturing]:
        ops = Capturing({}, (name,), offsets=offsets, all_tokens=True)
        return call_stage(graph, ops, weights, x), ops

    if cotangent is None:
        _, ops = run({})
        return Samples(ops.inputs[name], ops.outputs[name], None), jnp.float32(ops.factors.get(name, 1.0))

    shape = jax.eval_shape(lambda: run({})[1].outputs[name])

    def kept(offset: Array) -> tuple[PyTree, tuple[tuple[Array, ...], Array, Array]]:
        output, ops = run({name: offset})
        return output, (ops.inputs[name], ops.outputs[name], jnp.float32(ops.factors.get(name, 1.0)))

    _, pull_back, (inputs, output, factor) = jax.vjp(kept, jnp.zeros(shape.shape), has_aux=True)
    [gradient] = pull_back(cotangent)
    return Samples(inputs, output, gradient), factor


def _run(graph: nnx.GraphDef[Any], weights: PyTree, x: PyTree) -> PyTree:
    return call_stage(graph, FakeQuant({}, all_tokens=True), weights, x)


def _pull_back(graph: nnx.GraphDef[Any], weights: PyTree, x: PyTree, cotangent: PyTree) -> PyTree:
    """Gradient with respect to the stage's input from that with respect to its output."""
    return jax.vjp(lambda x: _run(graph, weights, x), x)[1](cotangent)[0]


_capture_stage = jax.jit(_capture, static_argnums=(0, 1))
_run_stage = jax.jit(_run, static_argnums=0)
_pull_back_stage = jax.jit(_pull_back, static_argnums=0)


def float_stage_inputs(
    model: Model, chunks: Sequence[Float[Array, "images height width channels"]]
) -> tuple[dict[str, list[PyTree]], list[Output]]:
    """By stage its input for every chunk of images, and the model's outputs. These are all that stays in memory."""
    inputs: dict[str, list[PyTree]] = {}
    xs: list[PyTree] = [Tensor(jnp.asarray(chunk)) for chunk in chunks]
    for name, graph in stage_graphs(model.architecture).items():
        inputs[name] = xs
        xs = [_run_stage(graph, model.weights[name], x) for x in xs]
    return inputs, xs


def operations(model: Model, quantized: Collection[str]) -> list[Site]:
    """The weight and matmul sites whose layer has an operand among the quantized sites."""
    found = [site for site in sites_of(model.architecture) if site.kind in ("weight", "matmul")]
    return [site for site in found if any(operand in quantized for operand in _operand_sites(site))]


def layers(
    model: Model, inputs: dict[str, list[PyTree]], gradients: Sequence[Output] | None, quantized: Collection[str]
) -> Iterator[Layer]:
    """The linear layers and matmuls of `operations`, in the float model, last stage first, one in memory at a time.

    inputs: what `float_stage_inputs` returned; a stage's are dropped once it is done. gradients: of a loss with respect
    to the model's output, for every chunk; they are propagated back stage by stage, recomputing each from its input.
    None: the samples have no gradients.
    """
    by_stage: dict[str, list[Site]] = {name: [] for name in inputs}
    for site in operations(model, quantized):
        by_stage[next(name for name in by_stage if site.name.startswith(name + "."))].append(site)
    chunks = len(next(iter(inputs.values())))
    cotangents: list[PyTree] = [None] * chunks if gradients is None else list(gradients)
    for stage, graph in reversed(stage_graphs(model.architecture).items()):
        weights, xs = model.weights[stage], inputs.pop(stage)
        for site in by_stage[stage]:
            name = _layer_name(site)
            local = name.removeprefix(stage + ".")
            captured = [
                _capture_stage(graph, local, weights, x, cotangent) for x, cotangent in zip(xs, cotangents, strict=True)
            ]
            weight = None
            if site.kind == "weight":
                arrays = model.layer(name)
                weight = (arrays["kernel"], arrays.get("bias"))
            operation = Operation(weight, captured[0][1])
            yield Layer(name, _operand_sites(site), operation, [samples for samples, _ in captured])
            del captured
        if gradients is not None and inputs:
            cotangents = [
                _pull_back_stage(graph, weights, x, cotangent) for x, cotangent in zip(xs, cotangents, strict=True)
            ]
