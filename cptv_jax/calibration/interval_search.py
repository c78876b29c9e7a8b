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
Choice = Int[np.ndarray, "..."]  # of a candidate for every group, in the shape of the scale

_EPSILON = 1e-8  # smallest product of norms in a cosine
_BLOCK = 5  # candidates a call, between which hopeless ones are dropped
_SLACK = 1e-5  # relative; float32 sums of some thousand squares


def _squares(output: Array, samples: Samples) -> Array:
    return (output - samples.output) ** 2


def _weighted_squares(output: Array, samples: Samples) -> Array:
    assert samples.gradient is not None
    return (samples.gradient * (output - samples.output)) ** 2


def _group(values: Float[Array, "images ... channels"], shape: tuple[int, ...]) -> Float[Array, "images rows *groups"]:
    """Values with the groups that a scale of this shape stands for apart: [images, rows, *groups, members]."""
    images = values.shape[0]
    if len(shape) == 3:  # (heads, 1, 1)
        return jnp.moveaxis(values, 1, 2).reshape(images, values.shape[2], *shape, -1)
    if not shape:
        return values.reshape(images, -1, values.shape[-1])
    rows = values.reshape(images, -1, *shape, values.shape[-1] // shape[0])
    # A group of a single channel has no direction among channels: its values along the image are compared.
    return rows if rows.shape[-1] > 1 else jnp.moveaxis(rows, 1, -1).reshape(images, 1, *shape, -1)


def _loss(metric: Metric, output: Array, samples: Samples, shape: tuple[int, ...]) -> Float[Array, "*groups"]:
    """Mean over the members of every group of an image, summed over the images."""
    if metric == "cosine":
        ours, theirs = _group(output, shape), _group(samples.output, shape)
        norms = jnp.sqrt(jnp.sum(ours**2, -1)) * jnp.sqrt(jnp.sum(theirs**2, -1))
        losses = 1.0 - jnp.sum(ours * theirs, -1) / jnp.maximum(norms, _EPSILON)
        return jnp.sum(jnp.mean(losses, 1), 0)
    errors = (_weighted_squares if metric == "hessian" else _squares)(output, samples)
    return jnp.sum(jnp.mean(_group(errors, shape), (1, -1)), 0)


def _operand(quantizer: Quantizer | None, values: Array) -> Tensor:
    return FakeQuant({} if quantizer is None else {"operand": quantizer}).tensor("operand", Tensor(values))


def _output(
    operation: Operation,
    quantizers: tuple[Quantizer | None, Quantizer | None],
    samples: Samples,
    a: Tensor | None,
    arithmetic: Arithmetic,
) -> Array:
    """The operation's output with quantized operands, computed as in the quantized model. a: operand 0, if known."""
    a = _operand(quantizers[0], samples.operands[0]) if a is None else a
    if operation.weight is None:
        b = _operand(quantizers[1], samples.operands[1])
        return FakeQuant({}, arithmetic=arithmetic).matmul("layer", a, b, operation.factor).values  # type: ignore[arg-type]
    quantizer = {} if quantizers[1] is None else {weight_site("layer"): quantizers[1]}
    return FakeQuant(quantizer, arithmetic=arithmetic).linear("layer", *operation.weight, a).values


@dataclass(frozen=True)
class LossOptions:
    """What a compiled program of losses is made for; see LayerSearch."""

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
    shape = candidates.scale.shape[1:]
    shared = _operand(other, samples.operands[0]) if side == 1 else None

    def loss(candidate: Quantizer) -> Array:
        quantizers = (candidate, other) if side == 0 else (other, candidate)
        output = _output(operation, quantizers, samples, shared, options.arithmetic)
        return _loss(options.metric, output, samples, shape)

    return jax.lax.map(loss, candidates, batch_size=options.at_once if options.at_once > 1 else None)


@cache
def _program() -> Any:
    return jax.jit(_losses, static_argnums=(0, 1), compiler_options=compiler_options())


def stack(candidates: Sequence[Quantizer]) -> Quantizer:
    """Quantizers of equal shapes as one with a leading axis."""
    stacked: Quantizer = jax.tree.map(lambda *leaves: jnp.stack(leaves), *candidates)
    return stacked


def scale_by_factors(initial: Quantizer, factors: Float[np.ndarray, " candidates"]) -> Quantizer:
    """The initial quantizer with its scale times each of the factors, stacked."""
    return stack([initial.with_scale(initial.scale * factor) for factor in factors])


def pick(candidates: Quantizer, choice: Choice) -> Quantizer:
    """For every group the scale of the candidate that `choice` (of the scale's shape) names."""

    def choose(leaf: Array) -> Array:
        if choice.ndim and leaf.shape[1:] == choice.shape:
            return jnp.take_along_axis(leaf, jnp.asarray(choice)[None], 0)[0]
        return leaf[0] if choice.ndim else leaf[choice]

    picked: Quantizer = jax.tree.map(choose, candidates)
    return picked


@dataclass(frozen=True)
class OperandSearch:
    """What there is to choose for one operand.

    initial: its quantizer at first; None: the operand is not quantized. candidates: stacked; None: nothing to choose.
    neutral: the candidate to take where all are equally good, as for a tensor whose errors have no weight.
    alone: the other operand stays unquantized while this one's candidates are compared.
    """

    initial: Quantizer | None = None
    candidates: Quantizer | None = None
    neutral: int = 0
    alone: bool = False

    def quantizer(self, choice: Choice | None) -> Quantizer | None:
        """The chosen quantizer; None stands for the initial one."""
        return self.initial if choice is None or self.candidates is None else pick(self.candidates, choice)


@dataclass(frozen=True)
class LayerSearch:
    """The alternating search over a layer's operands.

    operands: by side.
    options: metric "hessian" weighs squared errors of the layer's output with squared gradients, "l2" does not,
        "cosine" is one minus the cosine of each token's output with its float output; at_once: candidates under vmap
        together, of which more take more memory; arithmetic: how codes are multiplied, which changes no result.
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
        """Losses of all candidates of one operand, float64, with the other one as `choices` say."""
        candidates, run = self._runner(side, choices)
        count = candidates.scale.shape[0]
        return np.sum([run(np.arange(count), chunk) for chunk in self.layer.samples], 0)

    def best(self, side: Side, choices: Sequence[Choice | None]) -> Choice:
        """The first candidate with the least loss, for every group: the first minimum of `losses`.

        After the first chunk of images the best candidate so far is run to the end. One whose loss exceeds that total,
        by more than the rounding of sums that XLA orders by a candidate's place in its block, can only grow, so it is
        dropped without running on further chunks.
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
        """The quantizers of both operands after so many rounds, weights before activations, operand a before b.

        A step whose circumstances are those of an earlier round is not repeated: it would choose alike.
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
        """One operand's candidates, and the function that gives the losses of some of them on a chunk, in float64."""
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
