"""Recordings of RepQ-ViT: first pass, reparameterization, weights, blocks and logits (steps 1 to 4)."""

import dataclasses

import jax.numpy as jnp
from jaxtyping import PyTree

from cptv_jax.calibration.first_pass import find_reparameterizable, initialize
from cptv_jax.compare import checks
from cptv_jax.compare.checks import FLOAT_LOGITS, Check
from cptv_jax.compare.interchange import Meta, Recording
from cptv_jax.compare.quantized import LOGITS, PARAMETERS, block_checks, weight_checks
from cptv_jax.compare.reparameterized import layer_checks, parameter_arrays, read_recipe, weight_names
from cptv_jax.compare.subject import Subject, prepare
from cptv_jax.interpreters import Tensor
from cptv_jax.methods import repq_vit
from cptv_jax.methods.repq_vit import RepqVitOptions
from cptv_jax.models.architecture import Architecture
from cptv_jax.recipe.spec import Recipe

FIRST_PASS = "1 parameters after the first pass"
TEACHER_FORCED = "1 parameters after the first pass, each block on its recorded input"
REWRITTEN = "2 reparameterized layers"
REWRITTEN_LOGITS = "4 reparameterized float model"


def _recipe_of(meta: Meta, architecture: Architecture) -> Recipe:
    return read_recipe(meta, architecture, "repq-vit", "bits.patch_input")


def compare_repq_vit(recording: Recording) -> list[Check]:
    """Compares a recording of RepQ-ViT.

    Args:
        recording: The recording.

    Returns:
        All checks of the file.

    Raises:
        InputError: For a missing or misshapen array.
    """
    subject = prepare(recording, _recipe_of)
    for key in ("fp_logits", "q_logits", "q_top1", "block_in/0", "reparam_fp_logits"):
        recording.raw(key)
    # Each quantizer is fitted on the first batch that reaches it.
    architecture, images = subject.model.architecture, jnp.asarray(subject.calibration[0])
    pairs = find_reparameterizable(subject.model, subject.recipe)
    inputs = _recorded_inputs(recording, subject)
    quantizers = initialize(subject.model, images, subject.recipe, pairs, True)
    free = checks.parameter_checks(FIRST_PASS, parameter_arrays(recording, "initparam", quantizers, architecture))
    found = subject.float_checks(recording)
    if inputs:
        forced = initialize(subject.model, images, subject.recipe, pairs, True, inputs=inputs)
        judged = checks.parameter_checks(TEACHER_FORCED, parameter_arrays(recording, "initparam", forced, architecture))
        found += judged
        if judged[-1].measured < free[-1].measured:
            free, quantizers = _excuse_spread(free), forced
    found += free
    model = repq_vit.finish(subject.model, subject.recipe, quantizers, RepqVitOptions())
    subject = dataclasses.replace(subject, quantize=lambda *_: model)

    found += layer_checks(recording, REWRITTEN, "reparam", model.model)
    found += checks.parameter_checks(PARAMETERS, parameter_arrays(recording, "param", model.quantizers, architecture))
    found += weight_checks(recording, subject, weight_names(architecture))
    found += block_checks(recording, subject)
    difference = subject.logits(model.model.stages()) - subject.recorded_logits(recording, "reparam_fp_logits")
    largest = checks.max_abs(difference)
    found.append(Check(REWRITTEN_LOGITS, "reparam_fp_logits", largest, FLOAT_LOGITS, "absolute", largest))
    return found + subject.quantized_logit_checks(recording, LOGITS, model.stages(), "q_logits", "q_top1")


def _recorded_inputs(recording: Recording, subject: Subject) -> dict[str, PyTree]:
    """Returns the inputs of the blocks during the recorded first pass, by stage."""
    shape = (len(subject.calibration[0]), subject.config.num_tokens, subject.config.width)
    found: dict[str, PyTree] = {}
    for index in recording.block_indices("calib_block_in/", subject.config.depth):
        recorded = recording.array(f"calib_block_in/{index}", *shape)
        found[f"blocks.{index}"] = Tensor(jnp.asarray(recorded, jnp.float32))
    return found


def _excuse_spread(free: list[Check]) -> list[Check]:
    """Returns the checks of a first pass that the comparison does not continue from.

    One unit in the last place can flip a code or a percentile, which changes the input of every later quantizer, and
    one channel's scale enters the scales of a whole LayerNorm. Where the blocks on their recorded inputs are nearer to
    the recording than the pass as a whole, the comparison continues from them; where a flip spread beyond the
    tolerance, only they are judged.
    """
    if free[-1].passed:
        return free
    remark = "a flipped choice spread; what follows starts from the blocks on their recorded inputs"
    return [*free[:-1], dataclasses.replace(free[-1], allowed=None, remark=remark)]
