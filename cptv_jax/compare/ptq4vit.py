"""Recordings of PTQ4ViT and its baseline: gradients, intervals, the search step by step, weights, blocks and logits."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np

from cptv_jax.calibration.interval_search import Choice, LayerSearch, Side
from cptv_jax.calibration.layerwise import Layer, float_stage_inputs, layers
from cptv_jax.compare import checks
from cptv_jax.compare.checks import Check
from cptv_jax.compare.interchange import Meta, Recording
from cptv_jax.compare.quantized import LOGITS, PARAMETERS, block_checks, weight_checks
from cptv_jax.compare.reparameterized import weight_names
from cptv_jax.compare.subject import prepare
from cptv_jax.compare.timm_names import Operand, operands_by_site
from cptv_jax.errors import InputError
from cptv_jax.methods.ptq4vit import Ptq4VitOptions, Search, layer_search, resolve, split_logit_gradient
from cptv_jax.models.architecture import Architecture, sites_of
from cptv_jax.quantized.model import QuantizedModel
from cptv_jax.quantizers import Quantizer, TwinGelu, TwinSoftmax
from cptv_jax.recipe.resolve import RecipeConfig
from cptv_jax.recipe.resolve import resolve as resolve_recipe
from cptv_jax.recipe.spec import MAX_BITS, MIN_BITS, Recipe

GRADIENTS = "0 gradients, from the recorded gradient of the logits"
INITIAL = "1 initial intervals"
SEARCH = "1 search, each step from the recorded choices before it"

GRADIENT_RELATIVE = 1e-4  # relative to the layer's largest gradient
# Candidates whose recorded similarities are this close, relative to the similarity, cannot be told apart by float32
# sums over all images with single codes flipped.
_TIES = {"hessian": 1e-3, "l2": 1e-3, "cosine": 1e-6}
_TIED = 0.01  # the share of choices that may be ties: the recordings have one in some hundreds
_PRESETS = {"ptq4vit": "ptq4vit", "base": "base-ptq"}
_INTERVALS = {"input": "a_interval", "weight": "w_interval", "A": "A_interval", "B": "B_interval"}


def _recipe_of(meta: Meta, architecture: Architecture) -> Recipe:
    widths = {name: meta.integer(f"bits.{name}", MIN_BITS, MAX_BITS) for name in ("weights", "activations")}
    preset = _PRESETS[meta.choice("variant", tuple(_PRESETS))]
    config = RecipeConfig(preset=preset, weight_bits=widths["weights"], activation_bits=widths["activations"])
    return resolve_recipe(config, sites_of(architecture))


def _search_of(meta: Meta) -> Search:
    """Returns the search in meta, with the published form of the softmax quantizer."""
    options = Ptq4VitOptions(
        metric=meta.choice("metric", tuple(_TIES)),  # type: ignore[arg-type]
        alpha=meta.number("search.alpha"),
        beta=meta.number("search.beta"),
        candidates=meta.integer("search.candidates"),
        rounds=meta.integer("search.rounds"),
        softmax_form="published",
    )
    return resolve(options, _PRESETS[meta.choice("variant", tuple(_PRESETS))])


def compare_ptq4vit(recording: Recording) -> list[Check]:
    """Compares a recording of PTQ4ViT or of its baseline.

    Args:
        recording: The recording.

    Returns:
        All checks of the file.

    Raises:
        InputError: For a missing or misshapen array, or one of an unknown module.
    """
    subject = prepare(recording, _recipe_of)
    search = _search_of(recording.meta)
    for key in ("fp_logits", "q_logits", "q_top1", "block_in/0"):
        recording.raw(key)
    inputs, outputs = float_stage_inputs(subject.model, [jnp.asarray(batch) for batch in subject.calibration])
    gradients = None
    if search.loss.metric == "hessian":
        images = sum(len(batch) for batch in subject.calibration)
        gradient = recording.array("logit_grad", images, subject.config.num_classes)
        gradients = split_logit_gradient(outputs, jnp.asarray(gradient, jnp.float32))
    replays = []
    of_gradients: list[Check] = []
    operands = operands_by_site(subject.model.architecture)
    _refuse_unknown_modules(recording, {operands[site].module for site in subject.recipe.sites})
    for layer in layers(subject.model, inputs, gradients, subject.recipe.sites):
        module = operands[layer.sites[1]].module
        if gradients is not None and f"raw_grad/{module}" in recording:
            of_gradients.append(_check_gradient(recording, f"raw_grad/{module}", layer))
        replays.append(replay(recording, module, layer_search(layer, subject.recipe, search, {}), search.rounds))
    quantizers = {site: quantizer for done in replays for site, quantizer in done.quantizers.items()}
    model = QuantizedModel(subject.model, subject.recipe, {site: quantizers[site] for site in subject.recipe.sites})
    subject = dataclasses.replace(subject, quantize=lambda *_: model)
    initial = {site: quantizer for done in replays for site, quantizer in done.initial.items()}

    found = subject.float_checks(recording) + of_gradients
    found += checks.parameter_checks(INITIAL, _intervals(recording, "init", initial, operands))
    found += [done.check for done in replays if done.check is not None]
    found += check_ties(replays)
    found += checks.parameter_checks(PARAMETERS, _intervals(recording, "param", quantizers, operands))
    found += weight_checks(recording, subject, weight_names(subject.model.architecture))
    found += block_checks(recording, subject)
    return found + subject.quantized_logit_checks(recording, LOGITS, model.stages(), "q_logits", "q_top1")


def _refuse_unknown_modules(recording: Recording, known: set[str]) -> None:
    for module in recording.under("param/"):
        if module not in known:
            raise InputError(
                f"{recording.path}: 'param/{module}' belongs to no layer of the model and options that meta describes"
            )


def _check_gradient(recording: Recording, key: str, layer: Layer) -> Check:
    ours = np.concatenate([np.asarray(samples.gradient) for samples in layer.samples])
    if not layer.is_linear:
        ours = ours * float(layer.operation.factor)  # the reference's matmul comes before the factor
    recorded = recording.array(key, *ours.shape)
    largest = checks.max_abs(ours - recorded) / checks.max_abs(recorded)
    return Check(GRADIENTS, key, largest, GRADIENT_RELATIVE, "relative to the largest", largest)


@dataclass(frozen=True)
class Replay:
    """One layer's search next to the recorded one.

    Attributes:
        initial: By site, the initial quantizer.
        quantizers: By site, the final quantizer.
        check: The check of all choices; None if no similarities are recorded.
        count: The number of choices.
        tied: How many of them are ties.
    """

    initial: dict[str, Quantizer]
    quantizers: dict[str, Quantizer]
    check: Check | None = None
    count: int = 0
    tied: int = 0


def replay(recording: Recording, module: str, search: LayerSearch, rounds: int) -> Replay:
    """Repeats every step of a layer's search, each from the recorded choices before it.

    A choice that differs from the recorded one passes as a tie where the recorded similarities of both are as close as
    float noise makes them; the recorded choice is then taken, so that the following steps can be compared.

    Args:
        recording: The recording.
        module: The reference's name of the layer.
        search: The layer's search.
        rounds: Its rounds.

    Returns:
        The initial and final quantizers, and the check.
    """
    sites = search.layer.sites
    initial = {
        site: each.initial for site, each in zip(sites, search.operands, strict=True) if each.initial is not None
    }
    if not recording.under(f"search/{module}/"):
        fitted = search.search(rounds)
        return Replay(initial, {site: q for site, q in zip(sites, fitted, strict=True) if q is not None})

    path: list[Choice | None] = [None, None]  # recorded choices
    final: list[Choice | None] = [None, None]
    tables: dict[tuple[Side, bytes], np.ndarray] = {}
    wrong = tied = count = 0
    largest = 0.0
    for step in range(rounds * len(search.order)):
        side = search.order[step % len(search.order)]
        other = path[1 - side]
        circumstances = (side, b"" if other is None or search.operands[side].alone else other.tobytes())
        if circumstances not in tables:
            tables[circumstances] = search.losses(side, path)
        losses = tables[circumstances]
        shape = losses.shape[1:]
        recorded = recording.flat(f"search/{module}/{step}", losses.size).reshape(len(losses), -1).astype(np.float64)
        ours = np.argmin(losses.reshape(recorded.shape), 0)
        theirs = np.argmax(recorded, 0)
        best = np.max(recorded, 0)
        regret = (best - np.take_along_axis(recorded, ours[None], 0)[0]) / np.maximum(np.abs(best), 1e-300)
        close = regret <= _TIES[search.options.metric]
        wrong, tied = wrong + int(np.sum(~close)), tied + int(np.sum(close & (ours != theirs)))
        count += ours.size
        largest = max(largest, float(np.max(regret)))
        path[side] = theirs.reshape(shape)
        final[side] = np.where(close, theirs, ours).reshape(shape)
    quantizers = [operand.quantizer(choice) for operand, choice in zip(search.operands, final, strict=True)]
    check = Check(
        SEARCH,
        f"search/{module}",
        float(wrong),
        0.0,
        f"of {count} choices differ",
        largest,
        1 - (wrong + tied) / count,
        f"{tied} ties" if tied else "",
    )
    found = {site: q for site, q in zip(sites, quantizers, strict=True) if q is not None}
    return Replay(initial, found, check, count, tied)


def check_ties(replays: Sequence[Replay]) -> list[Check]:
    """Checks that no more choices pass as ties than float noise makes.

    Args:
        replays: The replays of all layers.

    Returns:
        One check; none where no similarities are recorded.
    """
    count, tied = sum(done.count for done in replays), sum(done.tied for done in replays)
    return [Check(SEARCH, "ties", float(tied), max(1.0, _TIED * count), f"of {count} choices")] if count else []


def _intervals(
    recording: Recording, prefix: str, quantizers: dict[str, Quantizer], operands: dict[str, Operand]
) -> list[tuple[str, np.ndarray, np.ndarray]]:
    """Lists every interval under `{prefix}/`, and the further parameters of twin quantizers.

    Returns:
        Key, our and the recorded values.
    """
    found = []
    for site, quantizer in quantizers.items():
        module = f"{prefix}/{operands[site].module}"
        values = {_INTERVALS[operands[site].role]: np.ravel(quantizer.scale)}
        if prefix == "param" and isinstance(quantizer, TwinSoftmax):
            values["split"] = np.ravel(quantizer.scale * quantizer.levels)
        if prefix == "param" and isinstance(quantizer, TwinGelu):
            values["a_neg_interval"] = np.ravel(quantizer.negative_scale)
        found += [
            (f"{module}/{name}", ours, recording.flat(f"{module}/{name}", ours.size)) for name, ours in values.items()
        ]
    return found
