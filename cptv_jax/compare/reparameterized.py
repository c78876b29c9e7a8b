"""The parts that recordings of RepQ-ViT and of ERQ have in common: names, parameters, rewritten layers."""

from collections.abc import Mapping
from types import MappingProxyType

import numpy as np

from cptv_jax.compare.checks import WEIGHT_ABSOLUTE, Check, Weight, weight_checks
from cptv_jax.compare.interchange import Meta, Recording
from cptv_jax.compare.timm_names import modules_by_layer, operands_by_site
from cptv_jax.errors import InputError
from cptv_jax.models.architecture import Architecture, sites_of
from cptv_jax.models.timm_weights import key_table
from cptv_jax.quantized.model import Model
from cptv_jax.quantizers import DualUniform, FractionalUniform, LogSqrt2, OffsetUniform, Quantizer
from cptv_jax.recipe.resolve import RecipeConfig, resolve
from cptv_jax.recipe.spec import MAX_BITS, MIN_BITS, Recipe

# The references' name for the quantizer of an operand.
_QUANTIZER = {"weight": "weight_quantizer", "input": "input_quantizer", "A": "quantizer_A", "B": "quantizer_B"}


def quantizer_names(architecture: Architecture) -> dict[str, str]:
    """Maps every site to the references' module of its quantizer.

    Args:
        architecture: The model's architecture.

    Returns:
        By site, the module's name.
    """
    operands = operands_by_site(architecture)
    return {site: f"{operand.module}.{_QUANTIZER[operand.role]}" for site, operand in operands.items()}


def weight_names(architecture: Architecture) -> dict[str, str]:
    """Maps every weight's site to the references' layer.

    Args:
        architecture: The model's architecture.

    Returns:
        By site, the layer's name.
    """
    return {
        site: operand.module for site, operand in operands_by_site(architecture).items() if operand.role == "weight"
    }


def read_recipe(meta: Meta, architecture: Architecture, preset: str, image_bits: str | None = None) -> Recipe:
    """Builds the recipe of a preset at the widths in meta.

    Args:
        meta: The recording's meta.
        architecture: The model's architecture.
        preset: The preset.
        image_bits: The field with the image's width; None keeps the preset's width.

    Returns:
        The recipe.
    """
    widths = {name: meta.integer(f"bits.{name}", MIN_BITS, MAX_BITS) for name in ("weights", "activations")}
    image = architecture.family.image_site
    overrides = {} if image_bits is None else {image: {"bits": meta.integer(image_bits, MIN_BITS, MAX_BITS)}}
    config = RecipeConfig(
        preset=preset, weight_bits=widths["weights"], activation_bits=widths["activations"], overrides=overrides
    )
    return resolve(config, sites_of(architecture))


def _parameters(quantizer: Quantizer) -> dict[str, np.ndarray]:
    """Returns a quantizer's parameters under the references' names."""
    if isinstance(quantizer, LogSqrt2):
        return {"delta": np.asarray(quantizer.scale)}
    if isinstance(quantizer, DualUniform):
        return {
            "delta": np.asarray(quantizer.outlier_scale),
            "zero_point": np.asarray(quantizer.outlier_zero_point),
            "delta_2": np.asarray(quantizer.scale),
            "zero_point_2": np.asarray(quantizer.zero_point),
        }
    assert isinstance(quantizer, OffsetUniform | FractionalUniform)
    return {"delta": np.asarray(quantizer.scale), "zero_point": np.asarray(quantizer.zero_point)}


def parameter_arrays(
    recording: Recording, prefix: str, quantizers: Mapping[str, Quantizer], architecture: Architecture
) -> list[tuple[str, np.ndarray, np.ndarray]]:
    """Collects every quantizer parameter under `{prefix}/`.

    Args:
        recording: The recording.
        prefix: The prefix of its arrays.
        quantizers: Our quantizers by site.
        architecture: The model's architecture.

    Returns:
        Key, our and the recorded values of each parameter.

    Raises:
        InputError: For a missing array, and for a recorded quantizer that the recipe lacks.
    """
    names = {site: f"{prefix}/{name}" for site, name in quantizer_names(architecture).items()}
    known = {names[site] for site in quantizers}
    for key in recording.arrays:
        if key.startswith(f"{prefix}/") and key.endswith("/delta") and key.removesuffix("/delta") not in known:
            raise InputError(
                f"{recording.path}: array '{key}' belongs to no quantizer of the model and options that meta describes"
            )
    found = []
    for site, quantizer in quantizers.items():
        for name, ours in _parameters(quantizer).items():
            key = f"{names[site]}/{name}"
            found.append((key, ours.ravel(), recording.flat(key, ours.size)))
    return found


def layer_checks(
    recording: Recording,
    group: str,
    prefix: str,
    model: Model,
    tolerances: Mapping[str, float] = MappingProxyType({}),
) -> list[Check]:
    """Compares rewritten weights and biases of linear layers and LayerNorms under `{prefix}/{module}/` (step 2).

    Args:
        recording: The recording.
        group: The rows' group.
        prefix: The prefix of its arrays.
        model: Our model with the rewritten layers.
        tolerances: By our layer, absolute tolerances that differ from the usual one.

    Returns:
        The rows, and the row "all".

    Raises:
        InputError: For a layer that the model lacks, and if nothing is recorded under the prefix.
    """
    modules = modules_by_layer(model.architecture)
    layers = {module: layer for layer, module in modules.items()}
    entries = {entry.key: entry for entry in key_table(model.architecture)}
    weights = []
    for module in recording.under(f"{prefix}/"):
        for name in recording.under(f"{prefix}/{module}/"):
            key = f"{prefix}/{module}/{name}"
            entry = entries.get(f"{module}.{name}")
            if entry is None or module not in layers:
                raise InputError(f"{recording.path}: array '{key}' belongs to no layer of the model in meta")
            ours = np.asarray(model.layer(layers[module])[entry.path[-1]])
            theirs = entry.to_module(recording.array(key, *entry.shape))
            tolerance = tolerances.get(layers[module], WEIGHT_ABSOLUTE)
            weights.append(Weight(key, ours, theirs, tolerance=tolerance))
    if not weights:
        raise InputError(f"{recording.path} lacks arrays under '{prefix}/'")
    return weight_checks(group, weights)
