"""The published recipes, by name."""

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from cptv_jax.recipe.spec import ObserverName, QuantizerName
from cptv_jax.registry import Registry


@dataclass(frozen=True)
class Preset:
    """The published choices behind a recipe name; null fields of RecipeConfig take these.

    Attributes:
        scope: "full" quantizes every tensor that an operation produces; "matmuls" quantizes only weights and the inputs
            of linear layers and matmuls, as most methods do.
        softmax: Quantizer of attention maps, in a recipe of scope "matmuls".
        gelu: Quantizer of GELU outputs, in a recipe of scope "matmuls".
        normalized_weight: Quantizer of the weights that read a LayerNorm, except in the last stage.
        input_bits: Width of the image; null means activation_bits.
        weight_observer: Observer of weights.
        activation_observer: Observer of activations.
        weight_signed: Signed weights, symmetric where the observer allows it.
        weight_per_channel: A scale for each output channel of a weight.
        image_weight_per_channel: The same for the weights that read the image; null means weight_per_channel.
        weight_parts: A weight whose output is cut into operands of matmuls (query, key, value) has a scale for each.
        activation_signed: Signed symmetric activations.
        per_head: Operands of attention's matmuls have a scale for each head.
        bias_correction: See SiteSpec.
        low_rank: See SiteSpec.
        power_of_two_factor: Residual sums have a scale times a power of two for each channel.
        integer_layer_norm: See Recipe.
        log_int_softmax: See Recipe.
        quantize_input: The image is quantized.
        softmax_bits: Width of attention maps; null means activation_bits.
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
    image_weight_per_channel: bool | None = None
    weight_parts: bool = False
    activation_signed: bool = False
    per_head: bool = False
    bias_correction: bool = True
    low_rank: bool = False
    power_of_two_factor: bool = True
    integer_layer_norm: bool = True
    log_int_softmax: bool = False
    quantize_input: bool = True
    softmax_bits: int | None = None


_OMSE: dict[str, Any] = {
    "scope": "matmuls",
    "weight_observer": "omse",
    "bias_correction": False,
    "power_of_two_factor": False,
    "integer_layer_norm": False,
}
# For methods that set every parameter themselves and quantize only the inputs of matmuls.
_MATMULS: dict[str, Any] = {
    "scope": "matmuls",
    "weight_observer": "method",
    "activation_observer": "method",
    "bias_correction": False,
    "power_of_two_factor": False,
    "integer_layer_norm": False,
}

# PTQ4ViT and its baseline: signed symmetric, three weight intervals for qkv, an interval for each head of matmul
# operands, the image in float.
_PTQ4VIT = Preset(
    **_MATMULS,
    weight_signed=True,
    weight_per_channel=False,
    weight_parts=True,
    activation_signed=True,
    per_head=True,
    quantize_input=False,
)

_PUBLISHED: dict[str, Preset] = {
    # Evol-Q's shipped flags (config_fq.py, --mode e2e), from which CPT-V starts.
    "evol-q": Preset(),
    # Its config.py: OMSE weights, LayerNorm in float.
    "evol-q-omse": Preset(weight_observer="omse", integer_layer_norm=False),
    # FQ-ViT as published: signed 8-bit weights, min-max, log-int-softmax at 4 bits.
    "fq-vit": Preset(
        activation_observer="minmax", weight_signed=True, bias_correction=False, log_int_softmax=True, softmax_bits=4
    ),
    # Plain calibration of matmul inputs, a start for block reconstruction; attention uniform or in powers of two.
    "omse": Preset(**_OMSE),
    "omse-log2": Preset(**_OMSE, softmax="log2"),
    # RepQ-ViT as published: the image keeps 8 bits.
    "repq-vit": Preset(**_MATMULS, softmax="log-sqrt2", input_bits=8),
    # ERQ as published (its TPAMI extension), and the same without dual uniform weights (its ICML version).
    "erq": Preset(**_MATMULS, softmax="log-sqrt2", quantize_input=False, normalized_weight="dual-uniform"),
    "erq-uniform": Preset(**_MATMULS, softmax="log-sqrt2", quantize_input=False),
    # AIQViT: a float low-rank term added to each weight, attention quantized in an interval.
    "aiqvit": Preset(**_MATMULS, softmax="focusing", input_bits=8, low_rank=True),
    # PTQ4ViT as published (configs/PTQ4ViT.py): twin uniform after softmax and GELU, patch convolution per channel.
    "ptq4vit": dataclasses.replace(
        _PTQ4VIT,
        softmax="twin-softmax",
        gelu="twin-gelu",
        image_weight_per_channel=True,
    ),
    # Its baseline (configs/BasePTQ.py): uniform everywhere.
    "base-ptq": _PTQ4VIT,
}

PRESETS: Registry[Preset] = Registry("recipe preset")
for _name, _preset in _PUBLISHED.items():
    PRESETS.register(_name, _preset)

DEFAULT_PRESET = "evol-q"
