"""ERQ (arXiv 2407.06794 and its TPAMI extension): the error of quantized activations, then that of weights, reduced
by ridge regression in closed form and by refined rounding, each linear layer by itself."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, PyTree

from cptv_jax.interpreters import Capturing, Tensor
from cptv_jax.methods.compensation import quantize_by_halves, ridge
from cptv_jax.methods.initialization import first_images, initialize, reparameterize, reparameterized
from cptv_jax.methods.percentile import fit_weight
from cptv_jax.models.architecture import call_stage, sites_of, stage_graphs
from cptv_jax.quantized import Model, QuantizedModel
from cptv_jax.quantizers import DualUniform, OffsetUniform, Quantizer
from cptv_jax.recipe import Recipe, SiteSpec

WEIGHT_PERCENTILES = (0.97, 0.98, 0.99, 0.995, 0.9995, 0.9997, 0.9999, 0.99995, 0.99999, 1.0)

_PUBLISHED_COE, _PUBLISHED_IMAGES, _PUBLISHED_TOKENS = 20_000.0, 1024, 197
_PRECISION = jax.lax.Precision.HIGHEST
Batch = Float[Array, "batch height width channels"]


@dataclass(frozen=True)
class ErqOptions:
    """images: how many calibration images, the first ones, the activations' quantizers are fitted on (published: 32);
        memory holds what one stage computes for all of them, while the weights' errors are reduced batch by batch.
    coe: the coefficient of the published code that sets the ridge terms; null scales its 20,000, which belongs to
        1,024 images, with what a layer reads, since the Gram matrix that a ridge term is added to is a sum over that.
    flips: at most so many roundings of each output channel are reconsidered in each half of the inputs.
    round_zero_point: round the zero points that reparameterization makes, for integer deployment; the published code
        leaves them fractional.
    """

    images: int = 32
    coe: float | None = None
    flips: int = 100
    round_zero_point: bool = False


@dataclass(frozen=True)
class Layer:
    """A linear layer as ERQ sees it.

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

    @property
    def order(self) -> np.ndarray:
        """Our inputs in the order (channel, row, column) of a convolution's weights, in which ERQ goes through them."""
        return np.arange(self.inputs).reshape(-1, self.channels).T.ravel()


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Moments:
    """Sums over rows a = (quantized input, 1) of a layer and its residual r = float output - layer(quantized input).

    gram: sum of a a^T, whose last entry is the number of rows. cross: sum of a r^T.
    """

    gram: Float[Array, "inputs+1 inputs+1"]
    cross: Float[Array, "inputs+1 outputs"]


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
        kernel = _extended(parameters[layer.name])
        result = jnp.matmul(rows[:, : len(kernel)], kernel, precision=_PRECISION)
        residual = ops.outputs[layer.name].reshape(result.shape) - result
        gram = jnp.matmul(rows.T, rows, precision=_PRECISION)
        found[layer.name] = Moments(gram, jnp.matmul(rows.T, residual, precision=_PRECISION))
    return output, found


_run_stage_moments = jax.jit(_stage_moments, static_argnums=(0, 1))


def _extended(parameters: Mapping[str, Array]) -> Float[Array, "inputs+1 outputs"]:
    """Kernel and, where there is one, bias: the weight of an input that is always 1."""
    if "bias" not in parameters:
        return parameters["kernel"]
    return jnp.concatenate([parameters["kernel"], parameters["bias"][None]])


def collect_moments(
    model: Model,
    batches: Sequence[Batch],
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
        for stage, graph in stage_graphs(model.architecture).items():
            prefix = f"{stage}."
            inside = [layer for layer in layers if layer.name.startswith(prefix)]
            relative = tuple(
                replace(layer, name=layer.name.removeprefix(prefix), reads=layer.reads.removeprefix(prefix))
                for layer in inside
            )
            read = {
                layer.reads.removeprefix(prefix): quantizers[layer.reads]
                for layer in inside
                if layer.reads in quantizers
            }
            parameters = {layer.name.removeprefix(prefix): model.layer(layer.name) for layer in inside}
            x, moments = _run_stage_moments(graph, relative, model.weights[stage], parameters, read, x)
            for name, new in moments.items():
                old = found.get(prefix + name)
                found[prefix + name] = new if old is None else jax.tree.map(jnp.add, old, new)
            on_stage()
    return found


def penalties(layer: Layer, rows: float, coe: float | None) -> tuple[float, float]:
    """Ridge terms of a layer that reads so many rows: of the activations' and of the weights' error reduction.

    The published ones are 0.1 coe, but 0.1 for the first of a layer that reads one row an image, and coe for the
    second of a convolution.
    """
    published = _PUBLISHED_IMAGES * (1 if layer.per_image else _PUBLISHED_TOKENS)
    scale = rows / published if coe is None else 1.0
    coe = _PUBLISHED_COE if coe is None else coe
    first = 0.1 if layer.per_image else 0.1 * coe
    second = coe if layer.convolution else 0.1 * coe
    return first * scale, second * scale


def reduce_activation_error(
    parameters: Mapping[str, Array], moments: Moments, penalty: float
) -> dict[str, Float[Array, "..."]]:
    """Kernel and bias that on quantized inputs come closest to the float outputs (ERQ, "Activation Quantization Error
    Reduction")."""
    kernel = _extended(parameters)
    size = len(kernel)
    gram, cross = np.asarray(moments.gram)[:size, :size], np.asarray(moments.cross)[:size]
    corrected = jnp.asarray(np.asarray(kernel) + ridge(gram, cross, penalty), jnp.float32)
    inputs = len(parameters["kernel"])
    return {"kernel": corrected[:inputs], **({"bias": corrected[inputs]} if size > inputs else {})}


def reduce_weight_error(
    layer: Layer, parameters: Mapping[str, Array], quantizer: Quantizer, moments: Moments, penalty: float, flips: int
) -> dict[str, Float[Array, "..."]]:
    """Kernel on the quantizer's grid and bias; the published code refines no roundings of a convolution."""
    assert isinstance(quantizer, OffsetUniform | DualUniform)
    kernel, bias = quantize_by_halves(
        parameters["kernel"],
        parameters.get("bias"),
        quantizer,
        np.asarray(moments.gram, np.float64),
        penalty,
        0 if layer.convolution else flips,
        layer.order,
    )
    return {"kernel": kernel} if bias is None else {"kernel": kernel, "bias": bias}


@dataclass(frozen=True)
class Rewritten:
    """A linear layer after both reductions. corrected: its parameters after the first, still in float."""

    corrected: Mapping[str, Array]
    quantizer: Quantizer
    parameters: Mapping[str, Array]


def rewrite(
    layer: Layer, parameters: Mapping[str, Array], spec: SiteSpec, moments: Moments, options: ErqOptions, correct: bool
) -> Rewritten:
    """Both reductions for one layer. spec: of its weight. correct: its input is quantized, so there is an error."""
    first, second = penalties(layer, float(moments.gram[-1, -1]), options.coe)
    if correct:
        parameters = reduce_activation_error(parameters, moments, first)
    quantizer = fit_weight(spec, parameters["kernel"], WEIGHT_PERCENTILES)
    final = reduce_weight_error(layer, parameters, quantizer, moments, second, options.flips)
    return Rewritten(parameters, quantizer, final)


def quantize(
    model: Model,
    batches: Sequence[Batch],
    recipe: Recipe,
    key: Array,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
    options: ErqOptions = ErqOptions(),
) -> QuantizedModel:
    """Quantizes what linear layers and matmuls read; all linear layers and the LayerNorms before them are rewritten.

    batches: normalised calibration images. key: unused, nothing here is random. on_progress(done, total) counts stages
    run and layers rewritten.
    """
    del key
    layers = layers_of(model, recipe)
    total = len(stage_graphs(model.architecture)) * (1 + len(batches)) + len(layers)
    done: Iterator[int] = iter(range(1, total + 1))

    def advance() -> None:
        on_progress(next(done), total)

    pairs = reparameterized(model, recipe)
    quantizers = initialize(model, first_images(batches, options.images), recipe, pairs, False, advance)
    model, changed = reparameterize(model, quantizers, pairs, options.round_zero_point)
    quantizers |= changed
    moments = collect_moments(model, batches, layers, quantizers, advance)
    parameters = {}
    for layer in layers:
        spec, correct = recipe.sites[f"{layer.name}.weight"], layer.reads in quantizers
        found = rewrite(layer, model.layer(layer.name), spec, moments.pop(layer.name), options, correct)
        quantizers[f"{layer.name}.weight"], parameters[layer.name] = found.quantizer, found.parameters
        advance()
    return QuantizedModel(model.with_layers(parameters), recipe, {site: quantizers[site] for site in recipe.sites})
