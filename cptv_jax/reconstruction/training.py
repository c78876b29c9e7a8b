"""What block reconstruction learns of a stage, and one optimizer step of it."""

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

_PREFERENCE_RATE = 0.1  # of the preferences among ranks: steps of a logit
_TINY = 1e-12  # relative errors of a target of zeros stay finite


# ---- parameters ---------------------------------------------------------------------------------------------------
# What is learned are steps of three kinds: "sites", of a candidate that holds what quantizers and biases have to move
# (a dictionary of Free by site, which a search could go on with); "kernels", of quantized weights whose quantizer has
# no learned rounding; "weights", of arrays that stay in float. The last two are added, by the array's path.


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Learnable:
    """A stage before it learns.

    Attributes:
        state: Of its differentiable form.
        candidate: What is learned of its sites, as it stands.
        units: Like the parameters: how much of each is one unit of its group's rate. A rate means the same for every
            site and width: a zero point's is in codes, a start's and a rounding's in steps, a bias's in input units.
    """

    state: PyTree
    candidate: Candidate
    units: PyTree


def round_zero_point(quantizer: Quantizer) -> Quantizer:
    """The quantizer with an integral zero point, which reconstruction works on (RepQ-ViT leaves fractional ones)."""
    return quantizer.round_zero_point() if isinstance(quantizer, FractionalUniform) else quantizer


def _choose_fields(spec: SiteSpec, config: ReconstructionConfig) -> set[str]:
    """The fields of Free that are learned of a site; where there are power-of-two factors, the zero point stays too."""
    rates = {
        "scale": config.scale_rate,
        "bias": config.weight_rate,
        "rounding": config.rounding_rate,
        "start": config.zero_point_rate,
        "zero_point": 0.0 if spec.observer == "ptf" else config.zero_point_rate,
    }
    return {"own", *(name for name, rate in rates.items() if rate)}


def _units_of(quantizer: Quantizer, free: Free, bias: MovableBias | None) -> Free:
    """One unit of a rate for each field of a site's candidate."""
    steps, ones = quantizer.free_units(), jax.tree.map(lambda leaf: jnp.ones((), jnp.float32), free)
    measured = {name: getattr(steps, name) for name in free.names if getattr(steps, name) is not None}
    if free.bias is not None and bias is not None:
        # Outputs without any weight have no unit to move a bias by, and keep theirs.
        measured["bias"] = jnp.where(bias.unit > 0, 1 / jnp.maximum(bias.unit, jnp.finfo(jnp.float32).tiny), 0.0)
    return replace(ones, **measured)


def _floats(
    state: PyTree, candidate: Candidate, kernels: Mapping[tuple[str, ...], str], config: ReconstructionConfig
) -> tuple[dict[str, Array], dict[str, Array]]:
    """Units of the arrays of a stage that are learned themselves: quantized kernels, and those that stay in float.

    kernels: the sites of quantized weights, by the path of their layer. What a candidate moves is no part of either.
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
    """What training needs of one stage.

    Args:
        model: Whose stage learns. Of quantizers with a learned rounding (uniform ones) roundings are learned as such,
            in `Free.rounding`, and are not folded into the kernels: the float weights stay the float model's, which
            closed-form proposals measure against, moments that bias correction restores stay the original's, and a
            search goes on from what was learned. Kernels of other weight quantizers move themselves.
        name: The stage's.
        config: Rates of 0 leave their parameters out.
        arithmetic: As of `Differentiable`.

    Returns:
        The differentiable stage's function, what binds candidates to its state, the stage before it learns, and its
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
    """The state of a stage with what it has learned in place.

    Args:
        bind: The differentiable stage's.
        learnable: The stage before.
        parameters: Steps, see `Free.move`; those of kernels and float arrays are added.

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
    """The group of every parameter."""
    fields = {"bias": "weight", "start": "zero_point"}

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
    """Adam with a cosine schedule to zero and a rate for each group of parameters."""
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
    """Weighted squared error, and the weighted squared target to divide it by."""
    return jnp.mean(importance * (output - target) ** 2), jnp.mean(importance * target**2) + _TINY


def price(quantizers: Mapping[str, Quantizer]) -> Float[Array, ""]:
    """What the terms cost whose ranks are being chosen, relative to the stage's output; 0 where there are none."""
    searched = [quantizer for quantizer in quantizers.values() if isinstance(quantizer, RankSearch)]
    return sum((quantizer.price for quantizer in searched), jnp.zeros(()))


def mix_inputs(x: Tensor, other: Float[Array, "..."], probability: float, key: Array) -> Tensor:
    """x with elements replaced, each with a probability, by those of the float model (QDrop, Wei et al. 2022)."""
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
    """One step on one batch: the new parameters and optimizer state."""
    if config.float_input:
        x = mix_inputs(x, x_float, config.float_input, key)

    def loss_of(parameters: PyTree) -> Array:
        learned = bind_learned(bind, learnable, parameters)
        error, power = relative_error(array_of(function(learned, x)), target, importance)
        return error / power + price(learned["quantizers"])

    gradients = jax.grad(loss_of)(parameters)
    updates, optimizer_state = make_optimizer(config).update(gradients, optimizer_state)
    # Adam's updates are of the size of the rate, whatever a parameter is measured in.
    updates = jax.tree.map(lambda update, unit: update * unit, updates, learnable.units)
    return optax.apply_updates(parameters, updates), optimizer_state


@cache
def train_step_program() -> Callable[..., tuple[PyTree, PyTree]]:
    """`_train_step`, compiled once for all stages that compute alike."""
    return jax.jit(_train_step, static_argnums=(0, 1, 2), compiler_options=compiler_options())
