"""What block reconstruction learns of a stage, and one optimizer step of it."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PyTree

from cptv_jax.interpreters import Tensor
from cptv_jax.quantized.execution import ModelStageFunction
from cptv_jax.quantized.model import QuantizedModel
from cptv_jax.quantizers import (
    Focusing,
    FractionalUniform,
    LowRank,
    Quantizer,
    RankSearch,
    innermost,
    spread,
    with_zero_point,
)
from cptv_jax.recipe.spec import SiteSpec
from cptv_jax.reconstruction.config import ReconstructionConfig
from cptv_jax.runtime.forward import array_of
from cptv_jax.runtime.mesh import compiler_options
from cptv_jax.runtime.optimizers import finite_gradients

_TERM = ("down", "up", "preference")  # what is learned of a low-rank term
_PREFERENCE_RATE = 0.1  # of the preferences among ranks: steps of a logit
_TINY = 1e-12  # relative errors of a target of zeros stay finite


# ---- parameters ---------------------------------------------------------------------------------------------------


def _site_of(path: tuple[Any, ...]) -> str:
    """The weight site of an array of a stage, by its path in the weights."""
    *layer, name = (key.key for key in path)
    return ".".join([*layer, "weight"]) if name == "kernel" else ""


def _of_quantizer(quantizer: Quantizer, spec: SiteSpec) -> dict[str, Array]:
    """Zero-initialized parameters of one quantizer."""
    found: dict[str, Array] = {}
    try:
        scale = quantizer.with_scale(quantizer.scale).scale
    except TypeError:  # its levels are absolute
        return found
    # Power-of-two factors must stay such, so the scales of a site move together.
    found["scale"] = jnp.zeros(() if spec.observer == "ptf" else scale.shape)
    if hasattr(innermost(quantizer), "zero_point") and not spec.symmetric and spec.observer != "ptf":
        found["zero_point"] = jnp.zeros_like(innermost(quantizer).zero_point)
    if isinstance(quantizer, Focusing):
        found["start"] = jnp.zeros_like(quantizer.start)
    if isinstance(quantizer, LowRank):
        found |= {name: jnp.zeros_like(getattr(quantizer, name)) for name in _TERM if hasattr(quantizer, name)}
    return found


def integral(quantizer: Quantizer) -> Quantizer:
    """The quantizer with an integral zero point, which reconstruction works on (RepQ-ViT leaves fractional ones)."""
    if not isinstance(quantizer, FractionalUniform):
        return quantizer
    base = quantizer.base
    return replace(base, zero_point=jnp.clip(jnp.round(base.zero_point), base.low, base.high))


def stage_state(model: QuantizedModel, stage: str) -> dict[str, PyTree]:
    """What of a stage can be learned: "weights", the module's arrays, and "quantizers" by site."""
    prefix = stage + "."
    quantizers = {s.removeprefix(prefix): q for s, q in model.quantizers.items() if s.startswith(prefix)}
    return {"weights": model.model.weights[stage], "quantizers": quantizers}


def with_stage_state(model: QuantizedModel, stage: str, state: Mapping[str, PyTree]) -> QuantizedModel:
    """The model with another state in one stage."""
    weights = {**model.model.weights, stage: state["weights"]}
    quantizers = {**model.quantizers, **{f"{stage}.{site}": q for site, q in state["quantizers"].items()}}
    return replace(model, model=replace(model.model, weights=weights), quantizers=quantizers)


def initial_parameters(state: PyTree, specs: Mapping[str, SiteSpec]) -> PyTree:
    """Zeros for everything that may be learned of a stage: with these, `bound` changes nothing.

    specs: its sites' specifications.
    """
    return {
        "quantizers": {site: _of_quantizer(quantizer, specs[site]) for site, quantizer in state["quantizers"].items()},
        "weights": jax.tree.map(jnp.zeros_like, state["weights"]),
    }


def _bound_quantizer(quantizer: Quantizer, learned: Mapping[str, Array]) -> Quantizer:
    if isinstance(quantizer, Focusing):
        quantizer = replace(quantizer, start=quantizer.start + learned["start"] * quantizer.scale)
    if isinstance(quantizer, LowRank):
        quantizer = replace(quantizer, **{n: getattr(quantizer, n) + learned[n] for n in _TERM if n in learned})
    if "scale" in learned:
        quantizer = quantizer.with_scale(quantizer.scale * jnp.exp(learned["scale"]))
    if "zero_point" in learned:
        quantizer = with_zero_point(quantizer, innermost(quantizer).zero_point + learned["zero_point"])
    return quantizer


def bound(state: PyTree, parameters: PyTree) -> PyTree:
    """The state of the stage with the learned parameters in place: that of an ordinary quantized stage.

    Scales are multiplied by the exponential of their parameter, which keeps them positive; zero points are moved and
    rounded; a quantized kernel is moved by steps of its channel, which is how roundings are learned: its codes are
    whatever the ordinary quantizer makes of the moved kernel. Nothing is left to fold.
    """
    learned = parameters["quantizers"]
    quantizers = {site: _bound_quantizer(q, learned.get(site, {})) for site, q in state["quantizers"].items()}

    def moved(path: tuple[Any, ...], array: Array, by: Array) -> Array:
        quantizer = state["quantizers"].get(_site_of(path))
        return array + (by if quantizer is None else by * spread(quantizer.scale, by))

    weights = jax.tree_util.tree_map_with_path(moved, state["weights"], parameters["weights"])
    return {"weights": weights, "quantizers": quantizers}


# ---- optimization -------------------------------------------------------------------------------------------------


def _labels(parameters: PyTree) -> PyTree:
    """The group of every parameter."""
    quantizers = parameters["quantizers"]

    def group(path: tuple[Any, ...], array: Array) -> str:
        return "rounding" if _site_of(path) in quantizers else "weight"

    return {
        "quantizers": {site: {name: name for name in learned} for site, learned in quantizers.items()},
        "weights": jax.tree_util.tree_map_with_path(group, parameters["weights"]),
    }


def optimizer_of(config: ReconstructionConfig) -> optax.GradientTransformation:
    """Adam with a cosine schedule to zero and a rate for each group of parameters."""
    assert config.steps is not None
    rates = {
        "scale": config.scale_rate,
        "zero_point": config.zero_point_rate,
        "rounding": config.rounding_rate,
        "weight": config.weight_rate,
        "start": config.zero_point_rate,
        "down": config.low_rank_rate,
        "up": config.low_rank_rate,
        "preference": _PREFERENCE_RATE,
    }
    groups = {
        name: optax.adam(optax.cosine_decay_schedule(rate, config.steps)) if rate else optax.set_to_zero()
        for name, rate in rates.items()
    }
    return optax.chain(finite_gradients(), optax.multi_transform(groups, _labels))


def relative_error(
    output: Float[Array, "batch ..."], target: Float[Array, "batch ..."], importance: Float[Array, "..."]
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Weighted squared error, and the weighted squared target to divide it by."""
    return jnp.mean(importance * (output - target) ** 2), jnp.mean(importance * target**2) + _TINY


def price(quantizers: Mapping[str, Quantizer]) -> Float[Array, ""]:
    """What the terms cost whose ranks are being chosen, relative to the stage's output; 0 where there are none."""
    searched = [quantizer for quantizer in quantizers.values() if isinstance(quantizer, RankSearch)]
    return sum((quantizer.price for quantizer in searched), jnp.zeros(()))


def mixed(x: Tensor, other: Float[Array, "..."], probability: float, key: Array) -> Tensor:
    """x with elements replaced, each with a probability, by those of the float model (QDrop, Wei et al. 2022)."""
    steps = other if x.scale is None else other / x.scale
    return Tensor(jnp.where(jax.random.bernoulli(key, probability, x.shape), steps, x.steps), x.scale)


def differentiable_outputs(function: ModelStageFunction, state: PyTree, x: Tensor) -> Float[Array, "batch ..."]:
    """What a quantized stage computes, with straight-through derivatives by its state."""
    return array_of(replace(function, differentiable=True)(state, x))


def _train_step(
    function: ModelStageFunction,
    config: ReconstructionConfig,
    state: PyTree,
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
        x = mixed(x, x_float, config.float_input, key)

    def loss_of(parameters: PyTree) -> Array:
        learned = bound(state, parameters)
        error, power = relative_error(differentiable_outputs(function, learned, x), target, importance)
        return error / power + price(learned["quantizers"])

    gradients = jax.grad(loss_of)(parameters)
    updates, optimizer_state = optimizer_of(config).update(gradients, optimizer_state)
    return optax.apply_updates(parameters, updates), optimizer_state


@cache
def train_step_program() -> Callable[..., tuple[PyTree, PyTree]]:
    """`_train_step`, compiled once for all stages that compute alike."""
    return jax.jit(_train_step, static_argnums=(0, 1), compiler_options=compiler_options())
