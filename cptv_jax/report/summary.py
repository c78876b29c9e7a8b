"""The figures of a quantization that reports, the command line and the benches show."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from cptv_jax.evaluation import Accuracy
from cptv_jax.models.architecture import sites_of
from cptv_jax.quantized.model import QuantizedModel
from cptv_jax.quantizers import Quantizer
from cptv_jax.recipe.sites import Site
from cptv_jax.search.events import Accepted, PassEnd, Proposed, Start

if TYPE_CHECKING:
    from cptv_jax.pipeline.outcome import Quantization

STAGES = {"float": "full precision", "base": "base method", "final": "after the search"}
_ROUNDING = "rounding"
_NOT_STORED = (_ROUNDING, "low", "high")  # in addition to codes: these hold roundings, the width the bounds
_FLOAT_BYTES = 4
_WORDS = {
    "scale": "scales",
    "zero_point": "zero points",
    "start": "starts of intervals",
    "factor": "factors of channels",
    _ROUNDING: "roundings of weights",
    "bias": "biases",
}


@dataclass(frozen=True)
class PassRow:
    """The losses after a pass.

    Attributes:
        number: The pass; 0 is the base method.
        loss: Loss on the images that judge candidates.
        held_out: Loss on the held-out images; None if no images are held out.
        evaluations: Candidates evaluated so far.
    """

    number: int
    loss: float
    held_out: float | None
    evaluations: int

    @property
    def name(self) -> str:
        """The row's name in a table."""
        return f"pass {self.number}" if self.number else "base method"


@dataclass(frozen=True)
class Change:
    """How many parameters of a kind the search changed.

    Attributes:
        kind: Kind of parameters, in the plural.
        changed: Number of parameters that changed.
        total: Number of parameters of this kind.
    """

    kind: str
    changed: int
    total: int


@dataclass(frozen=True)
class Summary:
    """The figures of a quantization.

    Attributes:
        accuracies: Accuracies by key of STAGES, as far as they were measured.
        passes: The start and every pass; empty without a search.
        kept: The row that is the result; None without a search.
        accepted: How many steps lowered the loss.
        proposals: Number of passes in which steps for all stages were proposed.
        changes: Differences between base and final model.
        weight_bytes: Size of the quantized weights and their quantizers' parameters, packed.
        float_bytes: Size of the same weights in float32.
        notes: Requests of the configuration that were not met, in sentences.
    """

    accuracies: Mapping[str, Accuracy]
    passes: tuple[PassRow, ...]
    kept: PassRow | None
    accepted: int
    proposals: int
    changes: tuple[Change, ...]
    weight_bytes: int
    float_bytes: int
    notes: tuple[str, ...]

    @property
    def evaluations(self) -> int:
        """Candidates that the search evaluated."""
        return max((row.evaluations for row in self.passes), default=0)

    @property
    def judged(self) -> bool:
        """Whether held-out images chose among the passes."""
        return bool(self.passes) and all(row.held_out is not None for row in self.passes)


def summarize(outcome: "Quantization") -> Summary:
    """Computes the figures of an outcome.

    Args:
        outcome: The outcome of `quantize`.

    Returns:
        The figures.
    """
    rows = tuple(
        PassRow(0, event.loss, event.held_out, 1)
        if isinstance(event, Start)
        else PassRow(event.number, event.loss, event.held_out, event.evaluations)
        for event in outcome.log
        if isinstance(event, Start | PassEnd)
    )
    return Summary(
        outcome.results,
        rows,
        _kept(rows),
        sum(isinstance(event, Accepted) for event in outcome.log),
        len({event.number for event in outcome.log if isinstance(event, Proposed)}),
        changes(outcome.base, outcome.model),
        *weight_bytes(outcome.model),
        outcome.notes,
    )


def _kept(rows: tuple[PassRow, ...]) -> PassRow | None:
    if not rows:
        return None
    judged = [(row.held_out, row.number) for row in rows if row.held_out is not None]
    if len(judged) < len(rows):
        return rows[-1]
    number = min(judged)[1]  # of equals the elder
    return next(row for row in rows if row.number == number)


def _leaves(tree: Any) -> dict[str, np.ndarray]:
    """Arrays by the name of the innermost field or key that holds them, and where that lies."""
    found = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        found[jax.tree_util.keystr(path, simple=True, separator=".")] = np.asarray(leaf)
    return found


def changes(base: QuantizedModel, final: QuantizedModel) -> tuple[Change, ...]:
    """Counts the parameters that differ between two quantized models of one recipe.

    Args:
        base: The model before a search.
        final: The model after it.

    Returns:
        Kinds of parameters that differ somewhere. A rounding counts if it changes the code of a weight.
    """
    if final is base:
        return ()
    changed: Counter[str] = Counter()
    total: Counter[str] = Counter()
    for site, quantizer in final.quantizers.items():
        before, after = _leaves(base.quantizers[site]), _leaves(quantizer)
        for path, value in after.items():
            name = path.rpartition(".")[2]
            if name not in _NOT_STORED and value.shape == before.get(path, value).shape:
                changed[name] += int(np.sum(value != before.get(path, value)))
                total[name] += value.size
    for weight in _quantized_weights(final):
        kernel = final.model.layer(weight.layer_name)["kernel"]
        changed[_ROUNDING] += _rounded_otherwise(final.quantizers[weight.name], kernel)
        total[_ROUNDING] += kernel.size
    before, after = _leaves(base.model.weights), _leaves(final.model.weights)
    for path, value in after.items():
        if path.rpartition(".")[2] == "bias":
            changed["bias"] += int(np.sum(value != before[path]))
            total["bias"] += value.size
    return tuple(Change(_WORDS.get(name, name), count, total[name]) for name, count in changed.items() if count)


def _quantized_weights(model: QuantizedModel) -> list[Site]:
    return [s for s in sites_of(model.model.architecture) if s.role == "weight" and s.name in model.quantizers]


def _rounded_otherwise(quantizer: Quantizer, kernel: jax.Array) -> int:
    """How many elements have another code than without the learned rounding."""

    def without(path: tuple[Any, ...], leaf: jax.Array) -> jax.Array:
        return jnp.zeros_like(leaf) if jax.tree_util.keystr(path[-1:], simple=True) == _ROUNDING else leaf

    if not any(path.rpartition(".")[2] == _ROUNDING for path in _leaves(quantizer)):
        return 0
    plain = jax.tree_util.tree_map_with_path(without, quantizer)
    return int(jnp.sum(quantizer.codes(kernel) != plain.codes(kernel)))


def weight_bytes(model: QuantizedModel) -> tuple[int, int]:
    """Measures the quantized weights.

    Args:
        model: The quantized model.

    Returns:
        Bytes of their codes, packed, and of their quantizers' parameters in float32; and bytes of the same weights in
        float32.
    """
    packed, plain = 0, 0
    for site in _quantized_weights(model):
        size = model.model.layer(site.layer_name)["kernel"].size
        stored = (
            value.size
            for path, value in _leaves(model.quantizers[site.name]).items()
            if path.rpartition(".")[2] not in _NOT_STORED
        )
        packed += -(-size * model.recipe.sites[site.name].bits // 8) + _FLOAT_BYTES * sum(stored)
        plain += _FLOAT_BYTES * size
    return packed, plain
