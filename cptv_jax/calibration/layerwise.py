"""What single linear layers and matmuls of the float model read and produce, and how much it matters, layer by layer.

All tokens count, including those in the last block that nothing reads: published methods calibrate on them.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from cptv_jax.interpreters import Capturing, Tensor
from cptv_jax.models.architecture import sites_of
from cptv_jax.models.walk import Plain, Run, visit_stage, walk
from cptv_jax.quantized.model import Model
from cptv_jax.recipe.sites import Site
from cptv_jax.runtime.stages import Output


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Samples:
    """One operation's arrays for some images.

    Attributes:
        operands: The input [images, ..., inputs] of a linear layer; both operands [images, heads, rows, inner] and
            [images, heads, inner, columns] of a matmul.
        output: What it produced.
        gradient: Gradient of the loss with respect to the output, or None.
    """

    operands: tuple[Float[Array, "..."], ...]
    output: Float[Array, "..."]
    gradient: Float[Array, "..."] | None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Operation:
    """A linear layer, output = x @ kernel + bias, or (weight None) a matmul, output = factor * a @ b.

    Attributes:
        weight: Kernel [inputs, outputs] of a linear layer, and its bias [outputs] or None.
        factor: Factor of a matmul.
    """

    weight: tuple[Float[Array, "inputs outputs"], Float[Array, " outputs"] | None] | None
    factor: Float[Array, ""]


@dataclass(frozen=True)
class Layer:
    """A linear layer or matmul of the float model with everything that happened at it.

    Attributes:
        name: The name in the model, such as "blocks.0.attn.qkv".
        sites: The sites of its two operands: input and weight, or both inputs.
        operation: What it computes.
        samples: What happened at it, one entry for each chunk of images.
    """

    name: str
    sites: tuple[str, str]
    operation: Operation
    samples: list[Samples] = field(repr=False)

    @property
    def is_linear(self) -> bool:
        """Whether it is a linear layer, not a matmul."""
        return self.operation.weight is not None


def _operand_sites(site: Site) -> tuple[str, str]:
    """Returns the sites of both operands of a weight's or a matmul's operation."""
    a, b = (*site.reads, site.name) if site.role == "weight" else site.reads
    return a, b


@dataclass(frozen=True)
class _Capture:
    """Visits a stage and finds the samples of one operation, named relative to the stage, and its factor.

    Its arrays are the gradient with respect to the stage's output, or None. The stage's output is not kept.
    """

    name: str

    def __call__(self, run: Run, x: PyTree, arrays: PyTree) -> tuple[PyTree, PyTree]:
        def capture(offsets: dict[str, Array]) -> tuple[PyTree, tuple[tuple[Array, ...], Array, Array]]:
            ops = Capturing({}, (self.name,), offsets=offsets, all_tokens=True)
            output = run(ops, x)
            factor = jnp.float32(ops.factors.get(self.name, 1.0))
            return output, (ops.inputs[self.name], ops.outputs[self.name], factor)

        if arrays is None:
            _, (inputs, output, factor) = capture({})
            return None, (Samples(inputs, output, None), factor)
        shape = jax.eval_shape(lambda: capture({})[1][1])
        _, pull_back, (inputs, output, factor) = jax.vjp(
            lambda offset: capture({self.name: offset}), jnp.zeros(shape.shape), has_aux=True
        )
        [gradient] = pull_back(arrays)
        return None, (Samples(inputs, output, gradient), factor)


@dataclass(frozen=True)
class _PullBack:
    """Visits a stage and finds the gradient with respect to its input from that with respect to its output."""

    def __call__(self, run: Run, x: PyTree, arrays: PyTree) -> tuple[PyTree, PyTree]:
        return None, jax.vjp(lambda x: Plain()(run, x, None)[0], x)[1](arrays)[0]


def float_stage_inputs(
    model: Model, chunks: Sequence[Float[Array, "_images height width channels"]]
) -> tuple[dict[str, list[PyTree]], list[Output]]:
    """Runs the float model on chunks of images. Only what it returns stays in memory.

    Args:
        model: The float model.
        chunks: Normalised calibration images.

    Returns:
        The inputs of every stage, one for each chunk, by stage; and the model's output for every chunk.
    """
    stages = model.architecture.stage_names
    inputs: dict[str, list[PyTree]] = {stage: [] for stage in stages}
    outputs: list[Output] = []
    for chunk in chunks:
        x: PyTree = Tensor(jnp.asarray(chunk))
        for stage, output, _ in walk(model.architecture, model.weights, x, dict.fromkeys(stages, Plain())):
            inputs[stage].append(x)
            x = output
        outputs.append(x)
    return inputs, outputs


def operations(model: Model, quantized: Collection[str]) -> list[Site]:
    """Finds the operations that have an operand among the quantized sites.

    Args:
        model: The float model.
        quantized: Names of quantized sites.

    Returns:
        The sites of their weights (for linear layers) and of their results (for matmuls).
    """
    found = [site for site in sites_of(model.architecture) if site.kind in ("weight", "matmul")]
    return [site for site in found if any(operand in quantized for operand in _operand_sites(site))]


def layers(
    model: Model, inputs: dict[str, list[PyTree]], gradients: Sequence[Output] | None, quantized: Collection[str]
) -> Iterator[Layer]:
    """Iterates over the linear layers and matmuls of `operations`, in the float model, last stage first.

    One of them is in memory at a time.

    Args:
        model: The float model.
        inputs: What `float_stage_inputs` returned; a stage's inputs are dropped once it is done.
        gradients: Gradients of a loss with respect to the model's output, for every chunk; they are propagated back
            stage by stage, recomputing each from its input. None: the samples have no gradients.
        quantized: Names of quantized sites.

    Yields:
        A layer with its samples, chunk by chunk.
    """
    architecture = model.architecture
    by_stage: dict[str, list[Site]] = {name: [] for name in inputs}
    for site in operations(model, quantized):
        by_stage[site.stage].append(site)
    chunks = len(next(iter(inputs.values())))
    cotangents: list[PyTree] = [None] * chunks if gradients is None else list(gradients)
    for stage in reversed(architecture.stage_names):
        xs = inputs.pop(stage)
        for site in by_stage[stage]:
            visit = _Capture(site.layer)
            captured = [
                visit_stage(architecture, model.weights, stage, visit, x, cotangent)[1]
                for x, cotangent in zip(xs, cotangents, strict=True)
            ]
            weight = None
            if site.role == "weight":
                arrays = model.layer(site.layer_name)
                weight = (arrays["kernel"], arrays.get("bias"))
            operation = Operation(weight, captured[0][1])
            yield Layer(site.layer_name, _operand_sites(site), operation, [samples for samples, _ in captured])
            del captured
        if gradients is not None and inputs:
            cotangents = [
                visit_stage(architecture, model.weights, stage, _PullBack(), x, cotangent)[1]
                for x, cotangent in zip(xs, cotangents, strict=True)
            ]
