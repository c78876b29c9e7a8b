"""The search for quantization intervals of one layer's two operands (PTQ4ViT, section 4.2 and algorithm 1)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from cptv_jax.calibration.layerwise import Layer, Operation, Samples
from cptv_jax.interpreters import FakeQuant, Tensor
from cptv_jax.interpreters.arithmetic import Arithmetic
from cptv_jax.quantizers import Quantizer
from cptv_jax.recipe.sites import weight_site
from cptv_jax.runtime.mesh import compiler_options

Metric = Literal["hessian", "l2", "cosine"]
Side = Literal[0, 1]  # which operand of the layer
Choice = Int[np.ndarray, "..."]  # index of a candidate for every group, in the shape of the scale

_EPSILON = 1e-8  # smallest product of norms in a cosine
_BLOCK = 5  # candidates per call; hopeless ones are dropped between calls
_SLACK = 1e-5  # relative rounding error of float32 sums of a few thousand squares


def _squares(output: Array, samples: Samples) -> Array:
    """Returns squared errors of the output."""
    return (output - samples.output) ** 2


def _weighted_squares(output: Array, samples: Samples) -> Array:
    """Returns squared errors of the output, weighted with squared gradients."""
    assert samples.gradient is not None
    return (samples.gradient * (output - samples.output)) ** 2


def _group(values: Float[Array, "images ... channels"], shape: tuple[int, ...]) -> Float[Array, "images rows *groups"]:
    """Returns values [images, rows, *groups, members], with the groups that a scale of this shape stands for apart."""
    images = values.shape[0]
    if len(shape) == 3:  # (heads, 1, 1)
        return jnp.moveaxis(values, 1, 2).reshape(images, values.shape[2], *shape, -1)
    if not shape:
        return values.reshape(images, -1, values.shape[-1])
    rows = values.reshape(images, -1, *shape, values.shape[-1] // shape[0])
    # A group of a single channel has no direction among channels: its values along the image are compared.
    return rows if rows.shape[-1] > 1 else jnp.moveaxis(rows, 1, -1).reshape(images, 1, *shape, -1)


def _loss(metric: Metric, output: Array, samples: Samples, shape: tuple[int, ...]) -> Float[Array, "*groups"]:
    """Returns losses: the mean over the members of every group of an image, summed over the images."""
    if metric == "cosine":
        ours, theirs = _group(output, shape), _group(samples.output, shape)
        norms = jnp.sqrt(jnp.sum(ours**2, -1)) * jnp.sqrt(jnp.sum(theirs**2, -1))
        losses = 1.0 - jnp.sum(ours * theirs, -1) / jnp.maximum(norms, _EPSILON)
        return jnp.sum(jnp.mean(losses, 1), 0)
    errors = (_weighted_squares if metric == "hessian" else _squares)(output, samples)
    return jnp.sum(jnp.mean(_group(errors, shape), (1, -1)), 0)


def _operand(quantizer: Quantizer | None, values: Array) -> Tensor:
    """Returns an operand as the quantized model has it; without a quantizer, in float."""
    return FakeQuant({} if quantizer is None else {"operand": quantizer}).tensor("operand", Tensor(values))


def _output(
    operation: Operation,
    quantizers: tuple[Quantizer | None, Quantizer | None],
    samples: Samples,
    a: Tensor | None,
    arithmetic: Arithmetic,
) -> Array:
    """Returns the operation's output with quantized operands, computed as in the quantized model.

    Args:
        operation: The linear layer or matmul.
        quantizers: Of both operands.
        samples: What the operation reads.
        a: The quantized operand 0, where it is known already.
        arithmetic: How codes are multiplied.
    """
    a = _operand(quantizers[0], samples.operands[0]) if a is None else a
    if operation.weight is None:
        b = _operand(quantizers[1], samples.operands[1])
        return FakeQuant({}, arithmetic=arithmetic).matmul("layer", a, b, operation.factor).values  # type: ignore[arg-type]
    quantizer = {} if quantizers[1] is None else {weight_site("layer"): quantizers[1]}
    return FakeQuant(quantizer, arithmetic=arithmetic).linear("layer", *operation.weight, a).values


@dataclass(frozen=True)
class LossOptions:
    """What a compiled program of losses is made for.

    Attributes:
        metric: "hessian" weighs squared errors of the layer's output with squared gradients, "l2" does not, "cosine" is
            one minus the cosine of each token's output with its float output.
        at_once: How many candidates are evaluated together under vmap; more take more memory.
        arithmetic: How codes are multiplied, which changes no result.
    """

    metric: Metric
    at_once: int = 1
    arithmetic: Arithmetic = Arithmetic()  # noqa: RUF009 - frozen


def _losses(
    options: LossOptions,
    side: Side,
    operation: Operation,
    candidates: Quantizer,
    other: Quantizer | None,
    samples: Samples,
) -> Float[Array, "candidates *groups"]:
    """Returns the losses of candidates for the operand `side`, with `other` as the other operand's quantizer."""
    shape = candidates.scale.shape[1:]
    shared = _operand(other, samples.operands[0]) if side == 1 else None

    def loss(candidate: Quantizer) -> Array:
        quantizers = (candidate, other) if side == 0 else (other, candidate)
        output = _output(operation, quantizers, samples, shared, options.arithmetic)
        return _loss(options.metric, output, samples, shape)

    return jax.lax.map(loss, candidates, batch_size=options.at_once if options.at_once > 1 else None)


@cache
def _program() -> Any:
    """Returns `_losses`, compiled once for all layers that compute alike."""
    return jax.jit(_losses, static_argnums=(0, 1), compiler_options=compiler_options())


def stack(candidates: Sequence[Quantizer]) -> Quantizer:
    """Stacks quantizers of equal shapes.

    Args:
        candidates: The quantizers.

    Returns:
        One quantizer whose arrays have a leading axis of candidates.
    """
    stacked: Quantizer = jax.tree.map(lambda *leaves: jnp.stack(leaves), *candidates)
    return stacked


def scale_by_factors(initial: Quantizer, factors: Float[np.ndarray, " candidates"]) -> Quantizer:
    """Makes candidates from an initial quantizer by scaling its scale.

    Args:
        initial: The initial quantizer.
        factors: What its scale is multiplied with, for each candidate.

    Returns:
        The candidates, stacked.
    """
    return stack([initial.with_scale(initial.scale * factor) for factor in factors])


def pick(candidates: Quantizer, choice: Choice) -> Quantizer:
    """Picks a candidate for every group of a scale.

    Args:
        candidates: Stacked quantizers, see `stack`.
        choice: Index of the candidate for every group, of the scale's shape.

    Returns:
        The quantizer that has each group's scale from the chosen candidate.
    """

    def choose(leaf: Array) -> Array:
        if choice.ndim and leaf.shape[1:] == choice.shape:
            return jnp.take_along_axis(leaf, jnp.asarray(choice)[None], 0)[0]
        return leaf[0] if choice.ndim else leaf[choice]

    picked: Quantizer = jax.tree.map(choose, candidates)
    return picked


@dataclass(frozen=True)
class OperandSearch:
    """What there is to choose for one operand.

    Attributes:
        initial: Its quantizer at first; None means that the operand is not quantized.
        candidates: Stacked quantizers; None means that there is nothing to choose.
        neutral: The candidate to take where all are equally good, as for a tensor whose errors have no weight.
        alone: The other operand stays unquantized while this one's candidates are compared.
    """

    initial: Quantizer | None = None
    candidates: Quantizer | None = None
    neutral: int = 0
    alone: bool = False

    def quantizer(self, choice: Choice | None) -> Quantizer | None:
        """Returns the chosen quantizer.

        Args:
            choice: The chosen candidate for every group; None stands for the initial quantizer.
        """
        return self.initial if choice is None or self.candidates is None else pick(self.candidates, choice)


@dataclass(frozen=True)
class LayerSearch:
    """The alternating search over a layer's operands (PTQ4ViT, algorithm 1).

    Attributes:
        layer: The layer and its samples.
        operands: What there is to choose for each operand, by side.
        options: How losses are measured and computed.
    """

    layer: Layer
    operands: tuple[OperandSearch, OperandSearch]
    options: LossOptions

    @property
    def order(self) -> list[Side]:
        """The operands that have candidates, in the order of their turns."""
        order: tuple[Side, Side] = (1, 0) if self.layer.is_linear else (0, 1)
        return [side for side in order if self.operands[side].candidates is not None]

    def losses(self, side: Side, choices: Sequence[Choice | None]) -> Float[np.ndarray, "candidates *groups"]:
        """Computes the losses of all candidates of one operand.

        Args:
            side: The operand.
            choices: The present choices for both operands; the other operand is quantized as its choice says.

        Returns:
            The losses, float64.
        """
        candidates, run = self._runner(side, choices)
        count = candidates.scale.shape[0]
        return np.sum([run(np.arange(count), chunk) for chunk in self.layer.samples], 0)

    def best(self, side: Side, choices: Sequence[Choice | None]) -> Choice:
        """Finds the candidate with the least loss for every group: the first minimum of `losses`.

        After the first chunk of images the best candidate so far is run to the end. A candidate whose loss exceeds that
        total, by more than the rounding of sums that XLA orders by a candidate's place in its block, can only get
        worse, so it is dropped without running on further chunks.

        Args:
            side: The operand.
            choices: The present choices for both operands; the other operand is quantized as its choice says.

        Returns:
            The index of the best candidate for every group; the operand's neutral one where all are equally good.
        """
        candidates, run = self._runner(side, choices)
        samples = self.layer.samples
        count = candidates.scale.shape[0]
        totals = run(np.arange(count), samples[0])
        leaders = np.unique(np.argmin(totals, 0))
        bound = np.min(totals[leaders] + sum(run(leaders, chunk) for chunk in samples[1:]), 0) * (1 + _SLACK)
        alive = totals <= bound
        for chunk in samples[1:]:
            running = np.flatnonzero(alive.reshape(count, -1).any(-1))
            totals[running] += run(running, chunk)
            alive &= totals <= bound
        best: Choice = np.argmin(np.where(alive, totals, np.inf), 0)
        return np.where(np.ptp(totals, 0) == 0, self.operands[side].neutral, best)

    def search(self, rounds: int) -> tuple[Quantizer | None, Quantizer | None]:
        """Chooses quantizers for both operands in turns: weights before activations, operand a before b.

        A step whose circumstances are those of an earlier round is not repeated: it would choose alike.

        Args:
            rounds: Turns over both operands.

        Returns:
            The quantizers of both operands; None for an operand that is not quantized.
        """
        choices: list[Choice | None] = [None, None]
        seen: dict[Side, bytes] = {}
        for _ in range(rounds):
            for side in self.order:
                other = None if self.operands[side].alone else choices[1 - side]
                circumstances = b"initial" if other is None else other.tobytes()
                if seen.get(side) != circumstances:
                    choices[side] = self.best(side, choices)
                    seen[side] = circumstances
        first, second = (operand.quantizer(choice) for operand, choice in zip(self.operands, choices, strict=True))
        return first, second

    def _runner(
        self, side: Side, choices: Sequence[Choice | None]
    ) -> tuple[Quantizer, Callable[[Int[np.ndarray, " some"], Samples], Float[np.ndarray, "some *groups"]]]:
        """Returns one operand's candidates, and a function that computes float64 losses of some of them on a chunk."""
        operand, other_side = self.operands[side], 1 - side
        assert operand.candidates is not None
        candidates: Quantizer = jax.tree.map(np.asarray, operand.candidates)
        other = None if operand.alone else self.operands[other_side].quantizer(choices[other_side])
        width = max(_BLOCK, self.options.at_once)

        def run(some: Int[np.ndarray, " some"], samples: Samples) -> Float[np.ndarray, "some *groups"]:
            pending = []
            for start in range(0, len(some), width):
                # Repeating the last one keeps every call at one shape, and so at one compiled program.
                rows = some[np.minimum(np.arange(start, start + width), len(some) - 1)]
                block: Quantizer = jax.tree.map(lambda leaf, rows=rows: leaf[rows], candidates)
                pending.append(_program()(self.options, side, self.layer.operation, block, other, samples))
            return np.concatenate([np.asarray(losses, np.float64) for losses in pending])[: len(some)]

        return candidates, run
