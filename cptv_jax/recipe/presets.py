"""The published recipes, by name."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from cptv_jax.recipe.spec import ObserverName, QuantizerName


@dataclass(frozen=True)
class Preset:
    """The published choices behind a recipe name (null fields of RecipeConfig take these).

    scope: "full" quantizes every tensor that an operation produces; "matmuls" only weights and what linear layers and
        matmuls read, as most methods do.
    softmax, gelu: quantizers of what these functions produce, in a recipe of scope "matmuls".
    normalized_weight: quantizer of the weights that read a LayerNorm inside the blocks, in a recipe of scope "matmuls".
    input_bits: width of the image; null means activation_bits.
    activation_signed: signed symmetric activations. per_head: operands of attention's matmuls have a scale a head.
    weight_per_channel: see SiteSpec.per_channel. overrides: like RecipeConfig's, before those; a pattern may match
        nothing.
    """

    scope: Literal["full", "matmuls"] = "full"
    softmax: QuantizerName = "uniform"
    gelu: QuantizerName = "uniform"
    normalized_weight: QuantizerName = "uniform"
    input_bits: int | None = None
    weight_observer: ObserverName = "minmax"
    activation_observer: ObserverName = "omse"
    weight_signed: bool = False
    weight_per_channel: bool = True
    activation_signed: bool = False
    per_head: bool = False
    bias_correction: bool = True
    low_rank: bool = False
    power_of_two_factor: bool = True
    integer_layer_norm: bool = True
    log_int_softmax: bool = False
    quantize_input: bool = True
    softmax_bits: int | None = None
    overrides: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


_OMSE: dict[str, Any] = {
    "scope": "matmuls",
    "weight_observer": "omse",
    "bias_correction": False,
    "power_of_two_factor": False,
    "integer_layer_norm": False,
}
# Of methods that set every parameter themselves and quantize what matmuls read, not what other operations compute.
_MATMULS: dict[str, Any] = {
    "scope": "matmuls",
    "weight_observer": "method",
    "activation_observer": "method",
    "bias_correction": False,
    "power_of_two_factor": False,
    "integer_layer_norm": False,
}

# What PTQ4ViT and its baseline have in common: signed symmetric, three weight intervals for qkv, an interval a head for
# matmul operands, the image in float.
_PTQ4VIT = Preset(
    **_MATMULS,
    weight_signed=True,
    weight_per_channel=False,
    activation_signed=True,
    per_head=True,
    quantize_input=False,
    overrides={"*.qkv.weight": {"parts": 3}},
)

PRESETS: dict[str, Preset] = {
    # Evol-Q's shipped flags (config_fq.py, --mode e2e): what CPT-V starts from.
    "evol-q": Preset(),
    # Its config.py: OMSE weights, LayerNorm in float.
    "evol-q-omse": Preset(weight_observer="omse", integer_layer_norm=False),
    # FQ-ViT as published: signed 8-bit weights, min-max, log-int-softmax at 4 bits.
    "fq-vit": Preset(
        activation_observer="minmax", weight_signed=True, bias_correction=False, log_int_softmax=True, softmax_bits=4
    ),
    # Plain calibration of what matmuls read, a start for block reconstruction; attention uniform or in powers of two.
    "omse": Preset(**_OMSE),
    "omse-log2": Preset(**_OMSE, softmax="log2"),
    # RepQ-ViT as published: the image keeps 8 bits.
    "repq-vit": Preset(**_MATMULS, softmax="log-sqrt2", input_bits=8),
    # ERQ as published (its TPAMI extension), and the same without dual uniform weights (its ICML version).
    "erq": Preset(**_MATMULS, softmax="log-sqrt2", quantize_input=False, normalized_weight="dual-uniform"),
    "erq-uniform": Preset(**_MATMULS, softmax="log-sqrt2", quantize_input=False),
    # AIQViT: a float low-rank term beside each weight, attention quantized in an interval.
    "aiqvit": Preset(**_MATMULS, softmax="focusing", input_bits=8, low_rank=True),
    # PTQ4ViT as published (configs/PTQ4ViT.py): twin uniform after softmax and GELU, patch convolution per channel.
    "ptq4vit": dataclasses.replace(
        _PTQ4VIT,
        softmax="twin-softmax",
        gelu="twin-gelu",
        overrides={**_PTQ4VIT.overrides, "embed.proj.weight": {"per_channel": True}},
    ),
    # Its baseline (configs/BasePTQ.py): uniform everywhere.
    "base-ptq": _PTQ4VIT,
}


DEFAULT_PRESET = "evol-q"
