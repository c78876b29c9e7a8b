"""What block reconstruction learns in a stage, and one optimizer step of it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PyTree

from cptv_jax.interpreters import ArithmeticName, Tensor
from cptv_jax.quantized.candidate import Binding, Candidate, MovableBias, Space
from cptv_jax.quantized.execution import Differentiable, ModelStageFunction
from cptv_jax.quantized.layers import stage_sites
from cptv_jax.quantized.model import QuantizedModel
from cptv_jax.quantizers import FractionalUniform, Free, Quantizer, RankSearch, move_candidate, spread
from cptv_jax.recipe.spec import SiteSpec
from cptv_jax.reconstruction.config import ReconstructionConfig
from cptv_jax.runtime.forward import array_of
from cptv_jax.runtime.mesh import compiler_options
from cptv_jax.runtime.optimizers import zero_nonfinite

_PREFERENCE_RATE = 0.1  # of the preferences among ranks, in units of a logit
_TINY = 1e-12  # keeps the relative error of a target of zeros finite


# ---- parameters ---------------------------------------------------------------------------------------------------
# Training learns steps of three kinds: "sites" move a candidate of the free values of quantizers and biases (a
# dictionary of Free by site, from which a search can go on); "kernels" are added to quantized weights whose quantizer
# has no learned rounding; "weights" are added to arrays that stay in float. The last two are keyed by the array's path.


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Learnable:
    """A stage before it learns.

    Attributes:
        state: The state of its differentiable form.
        candidate: The present values of its sites that are learned.
        units: How much of each parameter is one unit of its group's rate, shaped like the parameters. A rate means the
            same for every site and width: a zero point's is in codes, a start's and a rounding's in steps, a bias's in
            input units.
    """

    state: PyTree
    candidate: Candidate
    units: PyTree


def round_zero_point(quantizer: Quantizer) -> Quantizer:
    """Rounds a quantizer's zero point, for reconstruction works on integral ones (RepQ-ViT leaves fractional ones).

    Args:
        quantizer: The quantizer.

    Returns:
        The quantizer with an integral zero point.
    """
    return quantizer.round_zero_point() if isinstance(quantizer, FractionalUniform) else quantizer


def _choose_fields(spec: SiteSpec, config: ReconstructionConfig) -> set[str]:
    """Returns the fields of Free that are learned for a site; with power-of-two factors, the zero point stays too."""
    rates = {
        "scale": config.scale_rate,
        "factor": config.scale_rate,
        "bias": config.weight_rate,
        "rounding": config.rounding_rate,
        "start": config.zero_point_rate,
        "zero_point": 0.0 if spec.observer == "ptf" else config.zero_point_rate,
    }
    return {"own", *(name for name, rate in rates.items() if rate)}


def _units_of(quantizer: Quantizer, free: Free, bias: MovableBias | None) -> Free:
    """Returns one unit of a rate for each field of a site's candidate."""
    steps, ones = quantizer.free_units(), jax.tree.map(lambda leaf: jnp.ones((), jnp.float32), free)
    measured = {name: getattr(steps, name) for name in free.names if getattr(steps, name) is not None}
    if free.bias is not None and bias is not None:
        # The bias of an output whose weights are all zero has no unit to move by, and stays.
        measured["bias"] = jnp.where(bias.unit > 0, 1 / jnp.maximum(bias.unit, jnp.finfo(jnp.float32).tiny), 0.0)
    return replace(ones, **measured)


def _floats(
    state: PyTree, candidate: Candidate, kernels: Mapping[tuple[str, ...], str], config: ReconstructionConfig
) -> tuple[dict[str, Array], dict[str, Array]]:
    """Finds the arrays of a stage that are learned themselves. Whatever a candidate moves is not among them.

    Args:
        state: The stage's state.
        candidate: What is learned of its sites.
        kernels: The sites of quantized weights, by the path of their layer.
        config: Rates of 0 leave their arrays out.

    Returns:
        Units of quantized kernels, and of arrays that stay in float, by the array's path.
    """
    quantized: dict[str, Array] = {}
    plain: dict[str, Array] = {}
    for path, array in jax.tree_util.tree_leaves_with_path(state["weights"]):
        *layer, name = (key.key for key in path)
        site = kernels.get(tuple(layer))
        free = candidate.get(site, Free()) if site is not None else Free()
        key = jax.tree_util.keystr(path)
        if site is not None and name == "kernel":
            if free.rounding is None and config.rounding_rate:
                quantized[key] = spread(jnp.asarray(state["quantizers"][site].scale), array)
        elif config.weight_rate and not (name == "bias" and free.bias is not None):
            plain[key] = jnp.ones((), jnp.float32)
    return quantized, plain


def make_learnable(
    model: QuantizedModel, name: str, config: ReconstructionConfig, arithmetic: ArithmeticName | None = None
) -> tuple[ModelStageFunction, Binding, Learnable, PyTree]:
    """Prepares one stage for training.

    Quantizers with a learned rounding (uniform ones) learn it as such, in `Free.rounding`; it is not folded into the
    kernels. So the float weights stay the float model's, which closed-form proposals measure against; moments that bias
    correction restores stay the original's; and a search goes on from what was learned. Kernels of other weight
    quantizers move themselves.

    Args:
        model: The model.
        name: The name of the stage that learns.
        config: The options; rates of 0 leave their parameters out.
        arithmetic: See `Differentiable`.

    Returns:
        The differentiable stage's function, the binding of candidates to its state, the stage before it learns, and its
        parameters: zeros, with which `bind_learned` changes nothing.
    """
    parts = model.parts(name)
    names = [site.name for site in stage_sites(model.model.architecture)[name].values()]
    quantized_names = [site for site in names if site in model.quantizers]
    space = Space(quantized_names, offsets=True, rounding=config.rounding_rate > 0, own=True)
    stage = model.stage(name, Differentiable(arithmetic), space)
    candidate = {
        site: learned
        for site, free in stage.candidate.items()
        if (learned := free.only(*_choose_fields(parts.specs[site], config))).names
    }
    quantizers, biases = stage.state["quantizers"], stage.state["biases"]
    sites = {site: _units_of(quantizers[site], free, biases.get(site)) for site, free in candidate.items()}
    kernels, weights = _floats(stage.state, candidate, {path: site for site, path in parts.layers.items()}, config)
    units = {"sites": sites, "kernels": kernels, "weights": weights}
    arrays = {jax.tree_util.keystr(path): a for path, a in jax.tree_util.tree_leaves_with_path(stage.state["weights"])}
    parameters = {
        "sites": jax.tree.map(jnp.zeros_like, candidate),
        "kernels": {key: jnp.zeros_like(arrays[key]) for key in kernels},
        "weights": {key: jnp.zeros_like(arrays[key]) for key in weights},
    }
    assert isinstance(stage.function, ModelStageFunction) and isinstance(stage.bind, Binding)
    return stage.function, stage.bind, Learnable(stage.state, candidate, units), parameters


def bind_learned(bind: Binding, learnable: Learnable, parameters: PyTree) -> PyTree:
    """Places what a stage has learned in its state.

    Args:
        bind: The differentiable stage's binding.
        learnable: The stage before it learns.
        parameters: The steps, see `Free.move`; those of kernels and float arrays are added.

    Returns:
        A state whose "weights" and "quantizers" are those of an ordinary quantized model.
    """
    added = {**parameters["kernels"], **parameters["weights"]}

    def add_step(path: tuple[Any, ...], array: Array) -> Array:
        step = added.get(jax.tree_util.keystr(path))
        return array if step is None else array + step

    state = learnable.state
    weights = jax.tree_util.tree_map_with_path(add_step, state["weights"])
    return bind({**state, "weights": weights}, move_candidate(learnable.candidate, parameters["sites"]))


# ---- optimization -------------------------------------------------------------------------------------------------


def _labels(parameters: PyTree) -> PyTree:
    """Returns the group of every parameter."""
    fields = {"bias": "weight", "factor": "scale", "start": "zero_point"}

    def of_site(free: Free) -> Free:
        own = {name: "preference" if name == "preference" else "low_rank" for name in free.own or {}}
        named: dict[str, Any] = {name: fields.get(name, name) for name in free.names if name != "own"}
        return Free(**named, own=None if free.own is None else own)

    return {
        "sites": {site: of_site(free) for site, free in parameters["sites"].items()},
        "kernels": dict.fromkeys(parameters["kernels"], "rounding"),
        "weights": dict.fromkeys(parameters["weights"], "weight"),
    }


def make_optimizer(config: ReconstructionConfig) -> optax.GradientTransformation:
    """Makes Adam with a cosine schedule to zero and a rate for each group of parameters.

    Args:
        config: The options: steps and rates.

    Returns:
        The optimizer; it replaces non-finite gradients by zero.
    """
    assert config.steps is not None
    rates = {
        "scale": config.scale_rate,
        "zero_point": config.zero_point_rate,
        "rounding": config.rounding_rate,
        "weight": config.weight_rate,
        "low_rank": config.low_rank_rate,
        "preference": _PREFERENCE_RATE,
    }
    groups = {
        name: optax.adam(optax.cosine_decay_schedule(rate, config.steps)) if rate else optax.set_to_zero()
        for name, rate in rates.items()
    }
    return optax.chain(zero_nonfinite(), optax.multi_transform(groups, _labels))


def relative_error(
    output: Float[Array, "batch ..."], target: Float[Array, "batch ..."], importance: Float[Array, "..."]
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Computes the weighted squared error, and the weighted squared target to divide it by.

    Args:
        output: The stage's output.
        target: The float stage's output.
        importance: Weight of each element, or ().

    Returns:
        The mean squared error and the mean squared target.
    """
    return jnp.mean(importance * (output - target) ** 2), jnp.mean(importance * target**2) + _TINY


def price(quantizers: Mapping[str, Quantizer]) -> Float[Array, ""]:
    """Sums the prices of terms whose ranks are being chosen, relative to the stage's output.

    Args:
        quantizers: The stage's quantizers.

    Returns:
        The price; 0 where no rank is being chosen.
    """
    searched = [quantizer for quantizer in quantizers.values() if isinstance(quantizer, RankSearch)]
    return sum((quantizer.price for quantizer in searched), jnp.zeros(()))


def mix_inputs(x: Tensor, other: Float[Array, "..."], probability: float, key: Array) -> Tensor:
    """Replaces elements, each with a probability, by those of the float model (QDrop, Wei et al. 2022).

    Args:
        x: The stage's quantized input.
        other: The float model's input of the stage, in input units.
        probability: The probability.
        key: Random key.

    Returns:
        The mixed input.
    """
    steps = other if x.scale is None else other / x.scale
    return Tensor(jnp.where(jax.random.bernoulli(key, probability, x.shape), steps, x.steps), x.scale)


def _train_step(
    function: ModelStageFunction,
    bind: Binding,
    config: ReconstructionConfig,
    learnable: Learnable,
    parameters: PyTree,
    optimizer_state: PyTree,
    x: Tensor,
    x_float: Float[Array, "batch ..."],
    target: Float[Array, "batch ..."],
    importance: Float[Array, "..."],
    key: Array,
) -> tuple[PyTree, PyTree]:
    """Takes one optimizer step on one batch.

    Returns:
        The new parameters and optimizer state.
    """
    if config.float_input:
        x = mix_inputs(x, x_float, config.float_input, key)

    def loss_of(parameters: PyTree) -> Array:
        learned = bind_learned(bind, learnable, parameters)
        error, power = relative_error(array_of(function(learned, x)), target, importance)
        return error / power + price(learned["quantizers"])

    gradients = jax.grad(loss_of)(parameters)
    updates, optimizer_state = make_optimizer(config).update(gradients, optimizer_state)
    # Adam's updates are as large as the rate, whatever unit a parameter has.
    updates = jax.tree.map(lambda update, unit: update * unit, updates, learnable.units)
    return optax.apply_updates(parameters, updates), optimizer_state


@cache
def train_step_program() -> Callable[..., tuple[PyTree, PyTree]]:
    """Returns `_train_step`, compiled once for all stages that compute alike."""
    return jax.jit(_train_step, static_argnums=(0, 1, 2), compiler_options=compiler_options())
