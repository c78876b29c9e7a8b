"""Second moments of what linear layers read, from which rounding that makes up for its own error follows in closed form
(ERQ, arXiv 2407.06794; GPTQ, arXiv 2210.17323)."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, PyTree

from cptv_jax.interpreters import Capturing, Tensor
from cptv_jax.models.architecture import call_stage, sites_of, stage_graphs
from cptv_jax.quantized.model import Model
from cptv_jax.quantizers import Quantizer
from cptv_jax.recipe.spec import Recipe

_PRECISION = jax.lax.Precision.HIGHEST
Batch = Float[Array, "batch height width channels"]


@dataclass(frozen=True)
class Layer:
    """A linear layer with a quantized weight.

    name: its site. reads: the site of its input. channels: of an input that is an image (the layer is then a
    convolution, which reads patches of it), else the inputs. per_image: it reads one row an image, not one a token.
    """

    name: str
    reads: str
    inputs: int
    channels: int
    per_image: bool

    @property
    def convolution(self) -> bool:
        return self.inputs != self.channels


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Moments:
    """Sums over rows a = (quantized input, 1) of a layer and its residual r = float output - layer(quantized input).

    gram: sum of a a^T, whose last entry is the number of rows. cross: sum of a r^T.
    """

    gram: Float[Array, "extended extended"]
    cross: Float[Array, "extended outputs"]


def layers_of(model: Model, recipe: Recipe) -> tuple[Layer, ...]:
    """The linear layers whose weights the recipe quantizes, in the order of the forward pass."""
    sites = {site.name: site for site in sites_of(model.architecture)}
    found = []
    for site in sites.values():
        if site.kind == "weight" and site.name in recipe.sites:
            name, (reads,) = site.name.removesuffix(".weight"), site.reads
            inputs, image = site.shape[0], sites[reads].kind == "tensor"
            channels = sites[reads].shape[-1] if image else inputs
            found.append(Layer(name, reads, inputs, channels, per_image=len(sites[name].shape) == 2))
    return tuple(found)


def _stage_moments(
    graph: nnx.GraphDef[Any],
    layers: tuple[Layer, ...],
    weights: PyTree,
    parameters: Mapping[str, Mapping[str, Array]],
    quantizers: Mapping[str, Quantizer],
    x: PyTree,
) -> tuple[PyTree, dict[str, Moments]]:
    ops = Capturing({}, [layer.name for layer in layers], all_tokens=True)
    output = call_stage(graph, ops, weights, x)
    found = {}
    for layer in layers:
        (read,) = ops.inputs[layer.name]
        rows = read.reshape(-1, read.shape[-1])
        quantizer = quantizers.get(layer.reads)
        if quantizer is not None:
            rows = quantizer.values(quantizer.codes(rows))
        rows = jnp.concatenate([rows, jnp.ones((len(rows), 1), rows.dtype)], 1)
        kernel = extended(parameters[layer.name])
        result = jnp.matmul(rows[:, : len(kernel)], kernel, precision=_PRECISION)
        residual = ops.outputs[layer.name].reshape(result.shape) - result
        gram = jnp.matmul(rows.T, rows, precision=_PRECISION)
        found[layer.name] = Moments(gram, jnp.matmul(rows.T, residual, precision=_PRECISION))
    return output, found


_run_stage_moments = jax.jit(_stage_moments, static_argnums=(0, 1))


def _moments_of(
    model: Model, stage: str, layers: Sequence[Layer], quantizers: Mapping[str, Quantizer], x: PyTree
) -> tuple[PyTree, dict[str, Moments]]:
    """A stage's output for one batch of inputs, and the moments of those of the layers that it has, by full name."""
    prefix = f"{stage}."
    inside = [layer for layer in layers if layer.name.startswith(prefix)]
    relative = tuple(
        replace(layer, name=layer.name.removeprefix(prefix), reads=layer.reads.removeprefix(prefix)) for layer in inside
    )
    read = {layer.reads.removeprefix(prefix): quantizers[layer.reads] for layer in inside if layer.reads in quantizers}
    parameters = {layer.name.removeprefix(prefix): model.layer(layer.name) for layer in inside}
    graph = stage_graphs(model.architecture)[stage]
    output, found = _run_stage_moments(graph, relative, model.weights[stage], parameters, read, x)
    return output, {prefix + name: moments for name, moments in found.items()}


def _sum(sums: dict[str, Moments], new: Mapping[str, Moments]) -> None:
    for name, moments in new.items():
        sums[name] = jax.tree.map(jnp.add, sums[name], moments) if name in sums else moments


def extended(parameters: Mapping[str, Array]) -> Float[Array, "extended outputs"]:
    """Kernel and, where there is one, bias: the weight of an input that is always 1."""
    if "bias" not in parameters:
        return parameters["kernel"]
    return jnp.concatenate([parameters["kernel"], parameters["bias"][None]])


def collect_moments(
    model: Model,
    batches: Iterable[Batch],
    layers: Sequence[Layer],
    quantizers: Mapping[str, Quantizer],
    on_stage: Callable[[], None] = lambda: None,
) -> dict[str, Moments]:
    """Moments of every layer over all batches, in the float model, with each layer's input quantized by itself.

    One batch and one stage are in memory at a time, and the moments, whose size does not depend on the images.
    """
    found: dict[str, Moments] = {}
    for batch in batches:
        x: PyTree = Tensor(batch)
        for stage in stage_graphs(model.architecture):
            x, moments = _moments_of(model, stage, layers, quantizers, x)
            _sum(found, moments)
            on_stage()
    return found


def moments_by_stage(
    model: Model, batches: Iterable[Batch], layers: Sequence[Layer], quantizers: Mapping[str, Quantizer]
) -> Iterator[dict[str, Moments]]:
    """`collect_moments` of one stage after the other.

    The inputs of one stage for all batches are in memory at a time, and that stage's moments.
    """
    xs: list[PyTree] = [Tensor(batch) for batch in batches]
    for stage in stage_graphs(model.architecture):
        found: dict[str, Moments] = {}
        for index, x in enumerate(xs):
            xs[index], moments = _moments_of(model, stage, layers, quantizers, x)
            _sum(found, moments)
        yield found
