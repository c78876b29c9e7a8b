"""Files of kind `quantized`: parameters, weights, blocks and logits against ours (steps 1 to 4)."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from cptv_jax.compare import checks
from cptv_jax.compare.checks import Check
from cptv_jax.compare.interchange import Recording
from cptv_jax.compare.names import modules_by_site, output_site
from cptv_jax.compare.subject import Subject, prepare
from cptv_jax.errors import InputError
from cptv_jax.interpreters import Tensor, effective_weight, quantize_weight
from cptv_jax.models.timm_weights import key_table
from cptv_jax.quantized.execution import Simulated, Unrounded
from cptv_jax.quantizers import Log2, Quantizer, Uniform, spread
from cptv_jax.runtime.forward import apply_stage

PARAMETERS = "1 quantizer parameters"
WEIGHTS = "2 dequantized weights"
BLOCKS = "3 blocks alone, on the recorded input"
LOGITS = "4 quantized logits"
DEQUANTIZED = "4 logits with quantizers off, integer functions on"


def compare_quantized(recording: Recording) -> list[Check]:
    """Compares a recording of a model quantized by FQ-ViT or Evol-Q.

    Args:
        recording: The recording.

    Returns:
        All checks of the file.

    Raises:
        InputError: For a missing or misshapen array.
    """
    subject = prepare(recording)
    _require_keys(recording, subject)
    stages = subject.quantized.stages()
    found = subject.float_checks(recording)
    found += parameter_checks(recording, "param", subject.quantized.quantizers, subject.config.depth)
    found += weight_checks(recording, subject, modules_by_site(subject.config.depth))
    found += block_checks(recording, subject)
    found += subject.quantized_logit_checks(recording, LOGITS, stages, "q_logits", "q_top1")
    # Only Evol-Q's code has such a pass.
    if recording.reference == "evol-q" or "dequant_state_logits" in recording:
        recorded = subject.recorded_logits(recording, "dequant_state_logits")
        ours = subject.logits(subject.quantized.stages(Unrounded()))
        found += checks.logits_checks(DEQUANTIZED, ours, recorded, subject.limits)
    return found


def _require_keys(recording: Recording, subject: Subject) -> None:
    """Raises InputError for a missing array, before anything is computed."""
    keys = ["fp_logits", "q_logits", "q_top1", "block_in/0"]
    modules = modules_by_site(subject.config.depth)
    for site, spec in subject.recipe.sites.items():
        if spec.quantizer != "log2":
            keys += [f"param/{modules[site]}/scale", f"param/{modules[site]}/zero_point"]
        if subject.recipe.places[site].role == "weight":
            keys.append(f"qweight/{modules[site]}")
    for key in keys:
        recording.raw(key)


def parameter_checks(
    recording: Recording, prefix: str, quantizers: Mapping[str, Quantizer], depth: int, partial: bool = False
) -> list[Check]:
    """Compares scales and zero points under `{prefix}/{module}/` (step 1): one row each, and their sum as the verdict.

    A log2 quantizer has no parameters.

    Args:
        recording: The recording.
        prefix: The prefix of its arrays.
        quantizers: Our quantizers by site.
        depth: The model's number of blocks.
        partial: Whether the recording may lack some of the modules.

    Returns:
        The rows, and the row "all".

    Raises:
        InputError: For a recorded module that the recipe lacks, or the reverse.
    """
    modules = modules_by_site(depth)
    wanted = {modules[site]: quantizer for site, quantizer in quantizers.items() if not isinstance(quantizer, Log2)}
    recorded = {
        key.removeprefix(f"{prefix}/").removesuffix("/scale"): key
        for key in recording.arrays
        if key.startswith(f"{prefix}/") and key.endswith("/scale")
    }
    for module, key in recorded.items():
        if module not in wanted:
            raise InputError(
                f"{recording.path}: array '{key}' belongs to no quantizer of the model and options that meta describes"
            )
    arrays = []
    for module, quantizer in wanted.items():
        if partial and module not in recorded:
            continue
        uniform = getattr(quantizer, "base", quantizer)
        assert isinstance(uniform, Uniform)
        for name, value in (("scale", uniform.scale), ("zero_point", uniform.zero_point)):
            key = f"{prefix}/{module}/{name}"
            # A zero point that all channels share is recorded once, or once per channel.
            size = recording.raw(key).size if name == "zero_point" and np.size(value) == 1 else np.size(value)
            theirs = recording.flat(key, size)
            arrays.append((key, np.broadcast_to(np.ravel(value), theirs.shape), theirs))
    return checks.parameter_checks(PARAMETERS, arrays)


@jax.jit
def _effective_weight(quantizer: Quantizer, kernel: Array) -> tuple[Array, Array]:
    """Returns the matmul's weight [inputs, outputs], and how far a step of the code moves it [outputs]."""
    weight = quantize_weight(quantizer, kernel)
    if weight.gain is None:
        return effective_weight(weight), spread(quantizer.scale, kernel)
    # Bias correction stretches and shifts the grid. A constant channel has no gain, and no codes that could matter.
    step = jnp.maximum(quantizer.scale * weight.gain, jnp.finfo(jnp.float32).tiny)
    return effective_weight(weight), step


@jax.jit
def _on_grid(quantizer: Quantizer, values: Array) -> Tensor:
    return Tensor(quantizer.steps(values), quantizer.scale)


def weight_checks(recording: Recording, subject: Subject, modules: Mapping[str, str]) -> list[Check]:
    """Compares the weights that the matmuls use, bias correction included, in the reference's layout (step 2).

    Args:
        recording: The recording.
        subject: The recomputed model.
        modules: By site of a weight, the reference's name of its layer.

    Returns:
        The rows, and the row "all".
    """
    entries = {entry.key: entry for entry in key_table(subject.model.architecture)}
    weights = []
    for site, quantizer in subject.quantized.quantizers.items():
        place = subject.recipe.places[site]
        if place.role != "weight":
            continue
        entry = entries[f"{modules[site]}.weight"]
        kernel = subject.quantized.model.layer(place.layer_name)["kernel"]
        key = f"qweight/{modules[site]}"
        theirs = entry.to_module(recording.array(key, *entry.shape))
        values, step = (np.asarray(array) for array in _effective_weight(quantizer, kernel))
        weights.append(checks.Weight(key, values, theirs, step))
    return checks.weight_checks(WEIGHTS, weights)


def block_checks(recording: Recording, subject: Subject) -> list[Check]:
    """Compares every block, run on the input that the reference's own block had (step 3).

    Args:
        recording: The recording.
        subject: The recomputed model.

    Returns:
        One row per recorded block.
    """
    stages = subject.quantized.stages(Simulated(all_tokens=True))
    found = []
    tokens, width = subject.config.num_tokens, subject.config.width
    recording.array("block_in/0", None, tokens, width)
    for index in recording.block_indices("block_out/", subject.config.depth):
        before, stage = stages[index], stages[index + 1]
        key = f"block_out/{index}"
        recorded = recording.array("block_in/0" if index == 0 else f"block_out/{index - 1}", None, tokens, width)
        theirs = recording.array(key, len(recorded), tokens, width)
        x = Tensor(jnp.asarray(recorded, jnp.float32))
        quantizer = before.state["quantizers"].get(output_site(before.name))
        if quantizer is not None:
            # The recorded input is dequantized; the quantizer that made it recovers its integer steps.
            x = _on_grid(quantizer, x.steps)
        deviation = np.asarray(apply_stage(stage.function, stage.state, x).values) - theirs
        quantizer = stage.state["quantizers"].get(output_site(stage.name))
        tolerance, what, equal = checks.BLOCK_ABSOLUTE, "", None
        if quantizer is not None:
            scale = np.asarray(quantizer.scale)
            # Off by half of the finest channel's step: more than float noise, less than any flip of a code.
            tolerance, what = float(scale.min()) / 2, " (half a step)"
            equal = 1 - checks.fraction(checks.exceeds(deviation / scale, 0.5))
        share = checks.fraction(checks.exceeds(deviation, tolerance))
        unit = f"of the elements off by more than {tolerance:.2g}{what}"
        found.append(
            Check(BLOCKS, key, share, subject.limits.block_off, unit, checks.max_abs(deviation), equal, share=True)
        )
    return found
