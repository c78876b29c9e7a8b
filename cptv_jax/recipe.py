"""Recipes: for every site its quantizer, bits and granularity. Data only; presets name the published ones."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import partial
from typing import Any, Literal

import jax

from cptv_jax.errors import InputError
from cptv_jax.sites import Site, keeps_channels, layer_norm_readers
from cptv_jax.suggest import did_you_mean

ObserverName = Literal["minmax", "ema", "percentile", "omse", "ptf", "method"]
OBSERVERS: tuple[ObserverName, ...] = ("minmax", "ema", "percentile", "omse", "ptf", "method")
QuantizerName = Literal["uniform", "dual-uniform", "log2", "log-sqrt2", "focusing", "twin-softmax", "twin-gelu"]
QUANTIZERS: tuple[QuantizerName, ...] = (
    "uniform",
    "dual-uniform",
    "log2",
    "log-sqrt2",
    "focusing",
    "twin-softmax",
    "twin-gelu",
)
MIN_BITS, MAX_BITS = 2, 8
_WORDS = {bool: "true or false", str: "a name"}


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["bits"],
    meta_fields=[
        "quantizer",
        "signed",
        "symmetric",
        "per_channel",
        "parts",
        "per_head",
        "observer",
        "bias_correction",
        "low_rank",
    ],
)
@dataclass(frozen=True)
class SiteSpec:
    """How one tensor is quantized. A pytree whose one leaf is the width, so that all widths share compiled programs.

    quantizer: a name in QUANTIZERS.
    bits: width of the codes, 2 to 8.
    signed: codes from -2^(bits-1) instead of from 0.
    symmetric: zero point 0 and a range mirrored around zero.
    per_channel: one scale for each entry of the last axis (a weight's output channels, a token's features).
    parts: one scale for each of so many equal parts of the last axis (3: a qkv weight's query, key and value).
    per_head: one scale for each attention head (operands of attention's matmuls).
    observer: the calibration statistic that sets scale and zero point; "method": the base method's own search does.
    bias_correction: restore each output channel's mean and deviation (weights only).
    low_rank: a float term of low rank is added (weights only).
    """

    quantizer: QuantizerName = "uniform"
    bits: int = 8
    signed: bool = False
    symmetric: bool = False
    per_channel: bool = False
    parts: int = 1
    per_head: bool = False
    observer: ObserverName = "minmax"
    bias_correction: bool = False
    low_rank: bool = False


@dataclass(frozen=True)
class RecipeConfig:
    """What a user writes; `resolve` turns it into a table of sites.

    preset: a name in PRESETS; it fixes which kinds of site are quantized and how. Null means the base method's own.
    weight_bits, activation_bits, softmax_bits: widths, 2 to 8; softmax_bits null means activation_bits
        (FQ-ViT's preset: 4).
    weight_observer, activation_observer: null means the preset's.
    weight_signed: signed symmetric weights; null means the preset's.
    bias_correction, low_rank, power_of_two_factor, integer_layer_norm, log_int_softmax, quantize_input: null means the
        preset's.
    overrides: by site name or pattern (`blocks.*.mlp.fc1.weight`), fields of SiteSpec to change, or `null` to leave
        the site in float; later patterns win.
    """

    preset: str | None = None
    weight_bits: int = 8
    activation_bits: int = 8
    softmax_bits: int | None = None
    weight_observer: ObserverName | None = None
    activation_observer: ObserverName | None = None
    weight_signed: bool | None = None
    bias_correction: bool | None = None
    low_rank: bool | None = None
    power_of_two_factor: bool | None = None
    integer_layer_norm: bool | None = None
    log_int_softmax: bool | None = None
    quantize_input: bool | None = None
    overrides: dict[str, Any] = field(default_factory=dict)


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


_OF_ATTENTION = ("log2", "log-sqrt2", "focusing", "twin-softmax")  # their levels are those of values from 0 to 1
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


@dataclass(frozen=True)
class Recipe:
    """Every quantized site with its specification, and the arithmetic of LayerNorm and softmax.

    scope: "full" or "matmuls", see Preset.
    """

    name: str
    sites: Mapping[str, SiteSpec]
    integer_layer_norm: bool
    log_int_softmax: bool
    scope: str = "full"

    def of_stage(self, stage: str) -> dict[str, SiteSpec]:
        """The specifications of one stage, by site name relative to it."""
        prefix = stage + "."
        return {name.removeprefix(prefix): spec for name, spec in self.sites.items() if name.startswith(prefix)}


def resolve(config: RecipeConfig, sites: tuple[Site, ...]) -> Recipe:
    """The recipe that `config` gives for the sites of an architecture.

    Raises InputError for an unknown preset, observer or field, a width out of range, a pattern that matches no site, or
    what would have no effect or no meaning at a site.
    """
    preset_name = config.preset or DEFAULT_PRESET
    if preset_name not in PRESETS:
        raise InputError(f"unknown recipe preset '{preset_name}'{did_you_mean(preset_name, PRESETS)}")
    preset = PRESETS[preset_name]

    def choice(name: str) -> Any:
        chosen = getattr(config, name)
        return getattr(preset, name) if chosen is None else chosen

    _check_flags(config, preset_name, choice("power_of_two_factor"))
    softmax_bits = choice("softmax_bits") or config.activation_bits
    factor, log_softmax = choice("power_of_two_factor"), choice("log_int_softmax")
    observer, weight_observer = choice("activation_observer"), choice("weight_observer")
    # OMSE in the published code always fits a zero point; the other observers mirror signed ranges.
    symmetric = choice("weight_signed") and weight_observer != "omse"
    activation = SiteSpec(
        bits=config.activation_bits,
        signed=preset.activation_signed,
        symmetric=preset.activation_signed,
        observer=observer,
    )
    residual = SiteSpec(bits=config.activation_bits, per_channel=True, observer="ptf") if factor else activation
    softmax = (
        SiteSpec("log2", softmax_bits)
        if log_softmax
        else dataclasses.replace(
            activation, bits=config.activation_bits if config.softmax_bits is None else softmax_bits
        )
    )
    weight = SiteSpec(
        bits=config.weight_bits,
        signed=choice("weight_signed"),
        symmetric=symmetric,
        per_channel=preset.weight_per_channel,
        observer=weight_observer,
        bias_correction=choice("bias_correction"),
        low_rank=choice("low_rank"),
    )
    by_kind = {"weight": weight, "add": residual, "softmax": softmax}
    if preset.scope == "matmuls":
        # A twin quantizer's split is one for all heads; a focusing interval is each head's own.
        per_head = preset.softmax == "focusing" or (preset.per_head and preset.softmax == "uniform")
        by_kind["softmax"] = dataclasses.replace(softmax, quantizer=preset.softmax, per_head=per_head)
        by_kind["gelu"] = dataclasses.replace(activation, quantizer=preset.gelu)
        by_kind["operand"] = dataclasses.replace(activation, per_head=preset.per_head)
        by_kind.pop("add")
    read = {name for site in sites for name in site.reads}
    normalized = {name for names in layer_norm_readers(sites).values() for name in names}

    specs: dict[str, SiteSpec] = {}
    for site in sites:
        if site.name == "embed.input" and not choice("quantize_input"):
            continue
        if preset.scope == "matmuls":
            wanted = site.kind == "weight" or site.name in read
        else:
            wanted = site.kind not in ("operand", "hidden")
        if not wanted:
            continue
        spec = by_kind.get(site.kind, activation)
        if site.name in normalized:
            spec = dataclasses.replace(spec, quantizer=preset.normalized_weight)
        if site.name == "embed.input" and preset.input_bits is not None:
            spec = dataclasses.replace(spec, bits=preset.input_bits)
        specs[site.name] = spec
    for pattern, fields in preset.overrides.items():
        for name in (name for name in specs if fnmatchcase(name, pattern)):
            specs[name] = dataclasses.replace(specs[name], **fields)
    for pattern, change in config.overrides.items():
        _override(specs, pattern, change, sites, activation)
    known = {site.name: site for site in sites}
    for name, spec in specs.items():
        _check(name, spec, known[name])
        if spec.per_channel and not keeps_channels(known[name], sites):
            raise InputError(f"{name}: its channels are not those of what reads it; set per_channel: false")
    integer_layer_norm = choice("integer_layer_norm") and factor
    return Recipe(preset_name, specs, integer_layer_norm, log_softmax, preset.scope)


def _override(
    specs: dict[str, SiteSpec], pattern: str, change: Any, sites: tuple[Site, ...], default: SiteSpec
) -> None:
    names = [site.name for site in sites if fnmatchcase(site.name, pattern)]
    if not names:
        known = [site.name for site in sites]
        raise InputError(f"recipe.overrides: no site matches '{pattern}'{did_you_mean(pattern, known)}")
    fields = {f.name: type(f.default) for f in dataclasses.fields(SiteSpec)}
    if change is not None and not isinstance(change, dict):
        raise InputError(f"recipe.overrides.{pattern} must be a mapping of fields such as {{bits: 4}}, or null")
    for key, value in (change or {}).items():
        if key not in fields:
            raise InputError(f"recipe.overrides.{pattern}: unknown field '{key}'{did_you_mean(str(key), fields)}")
        if fields[key] in _WORDS and not isinstance(value, fields[key]):  # bits have a message of their own
            raise InputError(f"recipe.overrides.{pattern}: {key} is {value!r}; it must be {_WORDS[fields[key]]}")
    for name in names:
        if change is None:
            specs.pop(name, None)
        else:
            specs[name] = dataclasses.replace(specs.get(name, default), **change)


def _check_flags(config: RecipeConfig, preset: str, factor: bool) -> None:
    """Raises InputError for flags that would have no effect."""
    if PRESETS[preset].scope == "matmuls":
        for name in ("power_of_two_factor", "integer_layer_norm", "log_int_softmax"):
            if getattr(config, name):
                raise InputError(
                    f"recipe.{name} is true, but preset {preset} quantizes only what matmuls read; leave it out, or "
                    "set --recipe.preset to one that quantizes the whole network"
                )
    if config.integer_layer_norm and not factor:
        raise InputError(
            "recipe.integer_layer_norm is true, but its arithmetic needs power-of-two factors; "
            "set --recipe.power_of_two_factor true, or leave it out"
        )


def _check(name: str, spec: SiteSpec, site: Site) -> None:
    shape = site.shape
    if not (isinstance(spec.bits, int) and MIN_BITS <= spec.bits <= MAX_BITS):
        raise InputError(f"{name}: {spec.bits} bits asked for; widths from {MIN_BITS} to {MAX_BITS} are supported")
    if spec.observer not in OBSERVERS:
        raise InputError(f"{name}: unknown observer '{spec.observer}'{did_you_mean(spec.observer, OBSERVERS)}")
    if spec.quantizer not in QUANTIZERS:
        raise InputError(f"{name}: unknown quantizer '{spec.quantizer}'{did_you_mean(spec.quantizer, QUANTIZERS)}")
    if spec.quantizer in _OF_ATTENTION and site.kind != "softmax":
        raise InputError(f"{name}: a {spec.quantizer} quantizer is for attention maps; set another quantizer")
    if spec.observer == "ptf" and not spec.per_channel:
        raise InputError(f"{name}: observer 'ptf' needs per_channel: true")
    if spec.observer == "percentile" and spec.per_channel:
        raise InputError(f"{name}: observer 'percentile' works per tensor; set per_channel: false or another observer")
    if not isinstance(spec.parts, int) or spec.parts < 1 or shape[-1] % spec.parts:
        raise InputError(f"{name}: its {shape[-1]} channels do not make {spec.parts} equal parts; set another parts")
    if spec.per_head and len(shape) != 4:
        raise InputError(
            f"{name}: per_head is for tensors with an axis of heads, which this one lacks; set it to false"
        )
    if spec.per_channel + (spec.parts > 1) + spec.per_head > 1:
        raise InputError(f"{name}: per_channel, parts and per_head exclude each other; set one of them")
    if spec.parts > 1 and spec.bias_correction:
        raise InputError(f"{name}: bias_correction needs one scale a channel or tensor; set parts: 1")
    if (spec.parts > 1 or spec.per_head) and spec.observer != "method":
        raise InputError(f"{name}: observer '{spec.observer}' knows neither parts nor per_head; set observer: method")
    if spec.quantizer.startswith("twin") and spec.observer != "method":
        raise InputError(f"{name}: a {spec.quantizer} quantizer is set by a method's search; set observer: method")
