"""How a model is computed: executions, and the function and the state of a stage that each of them makes."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import PyTree

from cptv_jax.interpreters import (
    Arithmetic,
    ArithmeticName,
    FakeQuant,
    Operations,
    StraightThrough,
    Tensor,
    quantize_weight,
)
from cptv_jax.models.architecture import Architecture, call_stage, sites_of
from cptv_jax.quantized.candidate import StageParts
from cptv_jax.quantized.layers import replace_arrays
from cptv_jax.quantizers import Quantizer, Uniform, WrappedQuantizer, moments
from cptv_jax.quantizers.uniform import FractionalUniform
from cptv_jax.recipe.spec import Recipe
from cptv_jax.runtime.arithmetics import check_arithmetic, fastest_arithmetic

# Makes the operations of a stage from its state; hashable and equal for stages that compute alike.
MakeOperations = Callable[[PyTree], Operations]


@dataclass(frozen=True)
class ModelStageFunction:
    """Computes a stage of a model from its state.

    The state has "weights", the module's arrays, and whatever else the execution puts into it for `operations`.

    Attributes:
        graph: The static part of the stage's module.
        operations: Makes the stage's operations from its state.
    """

    graph: nnx.GraphDef[Any]
    operations: MakeOperations

    def __call__(self, state: PyTree, x: PyTree) -> PyTree:
        """Computes the stage.

        Args:
            state: The stage's state.
            x: The stage's input: a tensor, an array, or the output of the stage before.

        Returns:
            The stage's output.
        """
        return call_stage(
            self.graph, self.operations(state), state["weights"], x if isinstance(x, Tensor) else Tensor(x)
        )


class Execution(Protocol):
    """How a model is computed.

    Implementations are frozen dataclasses; what an execution makes for two stages that compute alike is equal.
    """

    def operations(self, architecture: Architecture, recipe: Recipe, quantizers: Iterable[Quantizer]) -> MakeOperations:
        """Gives the operations of the forward pass their meaning.

        Args:
            architecture: The whole model's architecture.
            recipe: The whole model's recipe; without sites for a float model.
            quantizers: The whole model's quantizers.

        Returns:
            A hashable function that makes a stage's operations from its state.
        """

    def state(self, parts: StageParts) -> dict[str, PyTree]:
        """Makes the state of a stage.

        Args:
            parts: The parts of the stage.

        Returns:
            "weights", "quantizers", "quantized" and "searched", in which candidates are placed (see `Binding`):
            "quantized" are weights as matmuls read them, by site, and "searched" the kernels and their moments from
            which a candidate's weights are quantized again; both may be empty where every pass quantizes weights.
        """


@dataclass(frozen=True)
class _FakeQuantOperations:
    """Makes FakeQuant's operations, or those of a class that is built alike. The fields are its arguments."""

    kind: type[FakeQuant] = FakeQuant
    arithmetic: Arithmetic = Arithmetic()  # noqa: RUF009 - frozen
    integer_layer_norm: bool = False
    log_int_softmax: bool = False
    rounding: bool = True
    all_tokens: bool = False

    def __call__(self, state: PyTree) -> FakeQuant:
        return self.kind(
            state["quantizers"],
            weights=state["quantized"],
            arithmetic=self.arithmetic,
            all_tokens=self.all_tokens,
            integer_layer_norm=self.integer_layer_norm,
            log_int_softmax=self.log_int_softmax,
            rounding=self.rounding,
        )


def _unquantized_state(parts: StageParts) -> dict[str, PyTree]:
    """Returns a stage's state for operations that quantize weights in every pass, or never."""
    return {"weights": parts.weights, "quantizers": dict(parts.quantizers), "quantized": {}, "searched": {}}


@dataclass(frozen=True)
class FullPrecision:
    """Computes without any quantizer: the teacher.

    Attributes:
        approximate: Multiply in bfloat16, where the result need not be exact.
        all_tokens: Also compute the tokens of the last block that the head does not read.

    Example:
        >>> logits = forward(model.stages(FullPrecision()), images).logits
    """

    approximate: bool = False
    all_tokens: bool = False

    def operations(self, architecture: Architecture, recipe: Recipe, quantizers: Iterable[Quantizer]) -> MakeOperations:
        """Returns float operations, see `Execution.operations`."""
        return _FakeQuantOperations(arithmetic=Arithmetic(approximate=self.approximate), all_tokens=self.all_tokens)

    def state(self, parts: StageParts) -> dict[str, PyTree]:
        """Returns a state without quantizers, see `Execution.state`."""
        return {"weights": parts.weights, "quantizers": {}, "quantized": {}, "searched": {}}


@dataclass(frozen=True)
class Simulated:
    """Computes quantized values and codes by floating-point operations. Weights are quantized once, not in each pass.

    Attributes:
        arithmetic: How codes are multiplied; None takes the fastest arithmetic here. The results are the same. Zero
            points that are not codes, as for a range that does not hold zero, make it "float32" whatever is given: no
            other arithmetic holds their steps.
        all_tokens: Also compute the tokens of the last block that the head does not read.

    Example:
        >>> logits = forward(quantized.stages(Simulated("int8")), images).logits
    """

    arithmetic: ArithmeticName | None = None
    all_tokens: bool = False

    def operations(self, architecture: Architecture, recipe: Recipe, quantizers: Iterable[Quantizer]) -> MakeOperations:
        """Returns quantized operations, see `Execution.operations`."""
        name = self.arithmetic if _steps_within_codes(quantizers) else "float32"
        return _FakeQuantOperations(
            FakeQuant,
            arithmetic_for(architecture, recipe, name),
            recipe.integer_layer_norm,
            recipe.log_int_softmax,
            all_tokens=self.all_tokens,
        )

    def state(self, parts: StageParts) -> dict[str, PyTree]:
        """Returns a state with quantized weights, see `Execution.state`."""
        quantized, kernels, weights = {}, {}, parts.weights
        for site, path in parts.layers.items():
            kernel = jnp.asarray(parts.kernel(site))
            wanted = _moments(kernel)
            quantized[site] = _quantize_weight(parts.quantizers[site], kernel, wanted)
            if site in parts.searched:
                kernels[site] = (kernel, wanted)
            weights = replace_arrays(weights, path, {"kernel": jnp.zeros(0, kernel.dtype)})
        return {"weights": weights, "quantizers": dict(parts.quantizers), "quantized": quantized, "searched": kernels}


@dataclass(frozen=True)
class Differentiable:
    """The numbers of `Simulated` with straight-through derivatives with respect to state and candidate.

    Weights are quantized in every pass, from the whole float weights in the state.

    Attributes:
        arithmetic: See `Simulated`; "bf16-codes" also computes derivatives from bfloat16 operands.
        all_tokens: See `Simulated`.

    Example:
        >>> stage = quantized.stage("blocks.3", Differentiable(), Space(sites))
        >>> stage.function(stage.bind(stage.state, stage.candidate), x)
    """

    arithmetic: ArithmeticName | None = None
    all_tokens: bool = False

    def operations(self, architecture: Architecture, recipe: Recipe, quantizers: Iterable[Quantizer]) -> MakeOperations:
        """Returns quantized operations with derivatives, see `Execution.operations`."""
        name = self.arithmetic if _steps_within_codes(quantizers) else "float32"
        return _FakeQuantOperations(
            StraightThrough,
            arithmetic_for(architecture, recipe, name),
            recipe.integer_layer_norm,
            recipe.log_int_softmax,
            all_tokens=self.all_tokens,
        )

    def state(self, parts: StageParts) -> dict[str, PyTree]:
        """Returns a state with float weights, see `Execution.state`."""
        return _unquantized_state(parts)


@dataclass(frozen=True)
class Unrounded:
    """The published code's "full-precision" pass: nothing is rounded, but integer LayerNorm and softmax still act.

    Attributes:
        all_tokens: See `Simulated`.

    Example:
        >>> logits = forward(quantized.stages(Unrounded()), images).logits
    """

    all_tokens: bool = False

    def operations(self, architecture: Architecture, recipe: Recipe, quantizers: Iterable[Quantizer]) -> MakeOperations:
        """Returns operations that do not round, see `Execution.operations`."""
        return _FakeQuantOperations(
            integer_layer_norm=recipe.integer_layer_norm,
            log_int_softmax=recipe.log_int_softmax,
            rounding=False,
            all_tokens=self.all_tokens,
        )

    def state(self, parts: StageParts) -> dict[str, PyTree]:
        """Returns a state with float weights, see `Execution.state`."""
        return _unquantized_state(parts)


_quantize_weight = jax.jit(quantize_weight)
_moments = jax.jit(moments)


def arithmetic_for(architecture: Architecture, recipe: Recipe, name: ArithmeticName | None = None) -> Arithmetic:
    """Chooses how to multiply codes of a recipe's widths.

    Args:
        architecture: The architecture that the recipe is for.
        recipe: The recipe, whose widest weights and activations bound the sums that are exact.
        name: The arithmetic; None takes the fastest one here.

    Returns:
        The arithmetic.

    Raises:
        InputError: The present backend cannot compute the arithmetic.
    """
    roles = {site.name: site.role for site in sites_of(architecture)}
    widths: dict[bool, list[int]] = {True: [], False: []}
    for site, spec in recipe.sites.items():
        widths[roles[site] == "weight"].append(spec.bits)
    if name is not None:
        check_arithmetic(name)
    return Arithmetic(name or fastest_arithmetic(), max(widths[True], default=8), max(widths[False], default=8))


def _steps_within_codes(quantizers: Iterable[Quantizer]) -> bool:
    """Returns whether every zero point is a code, so that steps are integers no larger than the largest code."""
    stored = (each for each in quantizers if not isinstance(each, FractionalUniform))  # their codes are not stored
    bases = (each.base if isinstance(each, WrappedQuantizer) else each for each in stored)
    points = jax.device_get([(grid.zero_point, grid.low, grid.high) for grid in bases if isinstance(grid, Uniform)])
    return all(np.all((point == np.round(point)) & (low <= point) & (point <= high)) for point, low, high in points)
