"""Recordings of ERQ: activations, reparameterization, both reductions, blocks and logits (steps 1 to 4)."""

import dataclasses

import jax.numpy as jnp
import numpy as np

from cptv_jax.calibration.first_pass import find_reparameterizable, initialize, reparameterize
from cptv_jax.calibration.moments import Moments, collect_moments, layers_of
from cptv_jax.compare import checks
from cptv_jax.compare.checks import WEIGHT_ABSOLUTE, Check
from cptv_jax.compare.interchange import Recording
from cptv_jax.compare.quantized import LOGITS, PARAMETERS, block_checks, weight_checks
from cptv_jax.compare.reparameterized import (
    layer_checks,
    parameter_arrays,
    quantizer_names,
    read_recipe,
    weight_names,
)
from cptv_jax.compare.subject import Subject, prepare
from cptv_jax.errors import InputError
from cptv_jax.methods.erq import ErqOptions, penalties, rewrite
from cptv_jax.models.architecture import Architecture
from cptv_jax.quantized.model import QuantizedModel
from cptv_jax.quantizers import DualUniform, Quantizer

FIRST_PASS = "1 activation parameters after the first pass"
SECOND_PASS = "1 activation parameters after reparameterization"
REWRITTEN = "2 reparameterized layers"
CORRECTED = "2 layers after the activations' error reduction"
ROUNDED = "2 layers after the weights' error reduction"
OUTLIERS = "1 outlier inputs of dual uniform weights"
_LARGEST_NOISE = 1e-3  # absolute, of weights after a correction; the recordings have up to 1.3e-5


def compare_erq(recording: Recording) -> list[Check]:
    """Compares a recording of ERQ.

    Args:
        recording: The recording.

    Returns:
        All checks of the file.

    Raises:
        InputError: For a missing or misshapen array.
    """
    recording.meta.choice("variant", ("expanded",))
    subject = prepare(recording, lambda meta, architecture: read_recipe(meta, architecture, "erq"))
    for key in ("fp_logits", "q_logits", "q_top1", "block_in/0"):
        recording.raw(key)
    options = ErqOptions(coe=recording.meta.number("coe"))
    images = _first_images(recording, subject)
    architecture, recipe = subject.model.architecture, subject.recipe
    pairs = find_reparameterizable(subject.model, recipe)
    quantizers = initialize(subject.model, images, recipe, pairs, False)
    found = subject.float_checks(recording)
    arrays = parameter_arrays(recording, "initparam", quantizers, architecture)
    found += checks.parameter_checks(FIRST_PASS, arrays)
    model, changed = reparameterize(subject.model, quantizers, pairs)
    quantizers |= changed
    found += layer_checks(recording, REWRITTEN, "reparam", model)
    arrays = parameter_arrays(recording, "reparamparam", quantizers, architecture)
    found += checks.parameter_checks(SECOND_PASS, arrays)

    layers = layers_of(model, recipe)
    moments = collect_moments(model, [jnp.asarray(batch) for batch in subject.calibration], layers, quantizers)
    rewritten, noise = {}, {}
    for layer in layers:
        spec, correct = recipe.sites[layer.site.name], layer.reads in quantizers
        rewritten[layer.name] = rewrite(layer, model.layer(layer.name), spec, moments[layer.name], options, correct)
        quantizers[layer.site.name] = rewritten[layer.name].quantizer
        penalty, _ = penalties(layer, float(moments[layer.name].gram[-1, -1]), options.coe)
        noise[layer.name] = max(WEIGHT_ABSOLUTE, _inverse_noise(moments[layer.name], penalty))
    corrected = model.with_layers({name: layer.corrected for name, layer in rewritten.items()})
    final = model.with_layers({name: layer.parameters for name, layer in rewritten.items()})
    quantized = QuantizedModel(final, recipe, {site: quantizers[site] for site in recipe.sites})
    subject = dataclasses.replace(subject, quantize=lambda *_: quantized)

    found += layer_checks(recording, CORRECTED, "after_Aqer", corrected, noise)
    found += _outlier_checks(recording, quantized, architecture)
    found += checks.parameter_checks(
        PARAMETERS, parameter_arrays(recording, "param", quantized.quantizers, architecture)
    )
    found += layer_checks(recording, ROUNDED, "after_Wqer", final, noise)
    found += weight_checks(recording, subject, weight_names(architecture))
    found += block_checks(recording, subject)
    return found + subject.quantized_logit_checks(recording, LOGITS, quantized.stages(), "q_logits", "q_top1")


def _first_images(recording: Recording, subject: Subject) -> jnp.ndarray:
    """Selects the images that activations are initialized on.

    Returns:
        The images, float32 [batch, height, width, channels].

    Raises:
        InputError: If meta's range begins before the calibration images.
    """
    images = np.concatenate(subject.calibration)
    used = recording.meta.index_range("calibration.images", 2**31, "calibration images")
    first = recording.meta.index_range("calibration.activation_init", used.stop, "images that calibrate")
    if first.start < used.start:
        raise InputError(f"{recording.path}: meta.calibration.activation_init begins before calibration.images")
    return jnp.asarray(images[first.start - used.start : first.stop - used.start])


def _inverse_noise(moments: Moments, penalty: float) -> float:
    """Bounds how far the reference's float32 inverse may lie from ours in float64.

    The bound is the condition number times rounding, with a limit that no condition excuses.

    Returns:
        An absolute deviation of weights.
    """
    gram = np.asarray(moments.gram, np.float64) + penalty * np.eye(len(moments.gram))
    correction = np.linalg.solve(gram, np.asarray(moments.cross, np.float64)[: len(gram)])
    noise = np.finfo(np.float32).eps * np.linalg.cond(gram) * np.abs(correction).max()
    return float(min(noise, _LARGEST_NOISE))


def _outlier_checks(recording: Recording, model: QuantizedModel, architecture: Architecture) -> list[Check]:
    """Returns the checks that the same inputs of dual uniform weights have the outliers' grid."""
    names = quantizer_names(architecture)
    return [
        _outlier_check(recording, f"param/{names[site]}/unique_top_indices", quantizer)
        for site, quantizer in model.quantizers.items()
        if isinstance(quantizer, DualUniform)
    ]


def _outlier_check(recording: Recording, key: str, quantizer: Quantizer) -> Check:
    assert isinstance(quantizer, DualUniform)
    ours = set(np.flatnonzero(quantizer.is_outlier).tolist())
    recorded = set(recording.integers(key, None, below=len(quantizer.is_outlier)).tolist())
    return Check(OUTLIERS, key, float(len(ours ^ recorded)), 0, f"of {len(quantizer.is_outlier)} inputs differ")
