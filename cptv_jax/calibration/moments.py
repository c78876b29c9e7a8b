"""Second moments of what linear layers read.

Rounding that compensates for its own error follows from them in closed form (ERQ, arXiv 2407.06794; GPTQ, arXiv
2210.17323).
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from cptv_jax.interpreters import Capturing, Tensor
from cptv_jax.models.architecture import site_table
from cptv_jax.models.walk import Run, visit_stage, walk
from cptv_jax.quantized.model import Model
from cptv_jax.quantizers import Quantizer
from cptv_jax.recipe.sites import Site, full_name
from cptv_jax.recipe.spec import Recipe

_PRECISION = jax.lax.Precision.HIGHEST
Batch = Float[Array, "_batch height width channels"]  # batches of one call may differ in size


@dataclass(frozen=True)
class Layer:
    """A linear layer with a quantized weight.

    Attributes:
        site: The site of its weight.
        inputs: Length of a row that its weight multiplies.
        channels: Channels of an input that is an image (the layer is then a convolution, which reads patches of it);
            for other layers, the number of inputs.
        per_image: It reads one row per image, not one per token.
    """

    site: Site
    inputs: int
    channels: int
    per_image: bool

    @property
    def name(self) -> str:
        """Its name in the model."""
        return self.site.layer_name

    @property
    def reads(self) -> str:
        """The site of its input."""
        (reads,) = self.site.reads
        return reads

    @property
    def convolution(self) -> bool:
        """Whether it is a convolution."""
        return self.inputs != self.channels


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Moments:
    """Sums over rows a = (quantized input, 1) of a layer and its residuals r = float output - layer(quantized input).

    Attributes:
        gram: Sum of a a^T, whose last entry is the number of rows.
        cross: Sum of a r^T.
    """

    gram: Float[Array, "extended extended"]
    cross: Float[Array, "extended outputs"]


def layers_of(model: Model, recipe: Recipe) -> tuple[Layer, ...]:
    """Finds the linear layers whose weights a recipe quantizes.

    Args:
        model: The float model.
        recipe: What is quantized, and how.

    Returns:
        The layers in the order of the forward pass.
    """
    sites = site_table(model.architecture)
    found = []
    for site in sites.values():
        if site.role == "weight" and site.name in recipe.sites:
            (reads,), inputs = site.reads, site.shape[0]
            channels = sites[reads].shape[-1] if sites[reads].kind == "image" else inputs
            found.append(Layer(site, inputs, channels, per_image=len(sites[site.layer_name].shape) == 2))
    return tuple(found)


@dataclass(frozen=True)
class _CollectMoments:
    """Visits a stage and sums up moments of some of its layers, named relative to the stage.

    Its arrays are the layers' parameters and, where their inputs are quantized, the inputs' quantizers, by layer.
    """

    layers: tuple[str, ...]

    def __call__(self, run: Run, x: PyTree, arrays: PyTree) -> tuple[PyTree, PyTree]:
        parameters, quantizers = arrays
        ops = Capturing({}, self.layers, all_tokens=True)
        output = run(ops, x)
        found = {}
        for layer in self.layers:
            (read,) = ops.inputs[layer]
            rows = read.reshape(-1, read.shape[-1])
            quantizer = quantizers.get(layer)
            if quantizer is not None:
                rows = quantizer.values(quantizer.codes(rows))
            rows = jnp.concatenate([rows, jnp.ones((len(rows), 1), rows.dtype)], 1)
            kernel = append_bias(parameters[layer])
            result = jnp.matmul(rows[:, : len(kernel)], kernel, precision=_PRECISION)
            residual = ops.outputs[layer].reshape(result.shape) - result
            gram = jnp.matmul(rows.T, rows, precision=_PRECISION)
            found[layer] = Moments(gram, jnp.matmul(rows.T, residual, precision=_PRECISION))
        return output, found


def _make_visits(
    model: Model, layers: Sequence[Layer], quantizers: Mapping[str, Quantizer]
) -> tuple[dict[str, _CollectMoments], dict[str, PyTree]]:
    """Returns the visit that collects the moments of a stage's layers, and its arrays, each by stage."""
    visits, arrays = {}, {}
    for stage in model.architecture.stage_names:
        inside = {layer.site.layer: layer for layer in layers if layer.site.stage == stage}
        visits[stage] = _CollectMoments(tuple(inside))
        parameters = {local: model.layer(layer.name) for local, layer in inside.items()}
        read = {local: quantizers[layer.reads] for local, layer in inside.items() if layer.reads in quantizers}
        arrays[stage] = (parameters, read)
    return visits, arrays


def _add(sums: dict[str, Moments], stage: str, new: Mapping[str, Moments]) -> None:
    """Adds a stage's moments to the sums, in place."""
    for local, moments in new.items():
        name = full_name(stage, local)
        sums[name] = jax.tree.map(jnp.add, sums[name], moments) if name in sums else moments


def append_bias(parameters: Mapping[str, Array]) -> Float[Array, "extended outputs"]:
    """Appends a layer's bias, where there is one, to its kernel: it is the weight of an input that is always 1.

    Args:
        parameters: The layer's kernel [inputs, outputs], and perhaps its bias [outputs].

    Returns:
        The kernel with the bias as its last row, or the kernel alone.
    """
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
    """Collects the moments of layers over all batches, in the float model, with each layer's input quantized by itself.

    One batch and one stage are in memory at a time, and the moments, whose size does not depend on the images.

    Args:
        model: The float model.
        batches: Normalised calibration images.
        layers: The layers.
        quantizers: Quantizers of the layers' inputs, by site; an input without one stays in float.
        on_stage: Called after every stage of every batch.

    Returns:
        The moments by layer.
    """
    visits, arrays = _make_visits(model, layers, quantizers)
    found: dict[str, Moments] = {}
    for batch in batches:
        for stage, _, moments in walk(model.architecture, model.weights, Tensor(batch), visits, arrays):
            _add(found, stage, moments)
            on_stage()
    return found


def moments_by_stage(
    model: Model, batches: Iterable[Batch], layers: Sequence[Layer], quantizers: Mapping[str, Quantizer]
) -> Iterator[dict[str, Moments]]:
    """Collects the same moments as `collect_moments`, one stage after the other.

    The inputs of one stage for all batches are in memory at a time, and that stage's moments.

    Args:
        model: The float model.
        batches: Normalised calibration images.
        layers: The layers.
        quantizers: Quantizers of the layers' inputs, by site; an input without one stays in float.

    Yields:
        The moments of a stage's layers, by layer.
    """
    visits, arrays = _make_visits(model, layers, quantizers)
    xs: list[PyTree] = [Tensor(batch) for batch in batches]
    for stage, visit in visits.items():
        found: dict[str, Moments] = {}
        for index, x in enumerate(xs):
            xs[index], moments = visit_stage(model.architecture, model.weights, stage, visit, x, arrays[stage])
            _add(found, stage, moments)
        yield found
