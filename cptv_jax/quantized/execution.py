"""How a quantized model is executed: the function and the state of each stage."""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import PyTree

from cptv_jax.interpreters import Arithmetic, ArithmeticName, FakeQuant, StraightThrough, Tensor, quantize_weight
from cptv_jax.models.architecture import call_stage
from cptv_jax.quantized.layers import _WEIGHT, _at, _path_of, _replaced
from cptv_jax.quantizers import (
    BiasCorrected,
    LowRank,
    Quantizer,
    Uniform,
    moments,
)
from cptv_jax.recipe.spec import Recipe
from cptv_jax.runtime.arithmetics import check_arithmetic, fastest_arithmetic


@dataclass(frozen=True)
class ModelStageFunction:
    """Computes a stage of a model from its state.

    The state has "weights", the module's arrays; "quantizers" by site; "quantized", the weights as matmuls read them,
    by site (their kernels among the module's arrays are empty); "searched", the kernels, and their moments, of the
    weights whose scales are searched; and "biases" of layers, by weight site, that move.

    differentiable: the same numbers with straight-through derivatives; it reads "weights", whole, and "quantizers".
    """

    graph: nnx.GraphDef[Any]
    integer_layer_norm: bool = False
    log_int_softmax: bool = False
    rounding: bool = True
    all_tokens: bool = False
    arithmetic: Arithmetic = Arithmetic()  # noqa: RUF009 - frozen
    differentiable: bool = False

    def __call__(self, state: PyTree, x: PyTree) -> PyTree:
        ops = (StraightThrough if self.differentiable else FakeQuant)(
            state["quantizers"],
            weights={} if self.differentiable else state["quantized"],
            arithmetic=self.arithmetic,
            all_tokens=self.all_tokens,
            integer_layer_norm=self.integer_layer_norm,
            log_int_softmax=self.log_int_softmax,
            rounding=self.rounding,
        )
        return call_stage(self.graph, ops, state["weights"], x if isinstance(x, Tensor) else Tensor(x))


_quantize_weight = jax.jit(quantize_weight)
_moments = jax.jit(moments)


def _state(weights: PyTree, quantizers: Mapping[str, Quantizer], searched: Collection[str]) -> dict[str, PyTree]:
    """A stage's state with its weights quantized once, so that no forward pass does it again."""
    quantized, kernels = {}, {}
    for site, quantizer in quantizers.items():
        if not site.endswith(_WEIGHT):
            continue
        path = _path_of(site)
        kernel = jnp.asarray(_at(weights, path)["kernel"])
        wanted = _moments(kernel)
        quantized[site] = _quantize_weight(quantizer, kernel, wanted)
        if site in searched:
            kernels[site] = (kernel, wanted)
        weights = _replaced(weights, path, {"kernel": jnp.zeros(0, kernel.dtype)})
    return {"weights": weights, "quantizers": dict(quantizers), "quantized": quantized, "searched": kernels}


def arithmetic_for(recipe: Recipe, name: ArithmeticName | None = None) -> Arithmetic:
    """How to multiply codes of a recipe's widths; None takes what is fastest here."""
    widths = {
        weight: [s.bits for site, s in recipe.sites.items() if site.endswith(_WEIGHT) == weight]
        for weight in (True, False)
    }
    if name is not None:
        check_arithmetic(name)
    return Arithmetic(name or fastest_arithmetic(), max(widths[True], default=8), max(widths[False], default=8))


def _steps_within_codes(quantizers: Iterable[Quantizer]) -> bool:
    """Whether every zero point is a code, so that steps are integers no larger than the largest code."""
    bases = (each.base if isinstance(each, BiasCorrected | LowRank) else each for each in quantizers)
    points = jax.device_get([(grid.zero_point, grid.low, grid.high) for grid in bases if isinstance(grid, Uniform)])
    return all(np.all((point == np.round(point)) & (low <= point) & (point <= high)) for point, low, high in points)
