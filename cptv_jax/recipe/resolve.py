"""Resolves the user's recipe configuration into the table of quantized sites."""

import dataclasses
from fnmatch import fnmatchcase
from typing import Any

from pydantic import Field

from cptv_jax.errors import InputError, did_you_mean
from cptv_jax.options import options
from cptv_jax.recipe.presets import DEFAULT_PRESET, PRESETS
from cptv_jax.recipe.sites import Site, keeps_channels, layer_norm_readers
from cptv_jax.recipe.spec import (
    MAX_BITS,
    MIN_BITS,
    OBSERVER_RULES,
    QUANTIZER_RULES,
    ObserverName,
    Recipe,
    SiteSpec,
)

_WORDS = {bool: "true or false", str: "a name"}


@options
class RecipeConfig:
    """Which tensors are quantized and how; null means the preset's choice.

    Example:
        >>> config = RecipeConfig(weight_bits=4, overrides={"head.fc.weight": {"bits": 8}, "embed.input": None})
    """

    preset: str | None = None
    """A published recipe: the kinds of site that are quantized, and how; null means the base method's own."""
    weight_bits: int = Field(default=8, ge=MIN_BITS, le=MAX_BITS)
    """Width of weights."""
    activation_bits: int = Field(default=8, ge=MIN_BITS, le=MAX_BITS)
    """Width of activations."""
    softmax_bits: int | None = Field(default=None, ge=MIN_BITS, le=MAX_BITS)
    """Width of attention maps; null means activation_bits (4 in FQ-ViT's preset)."""
    weight_observer: ObserverName | None = None
    """The statistic that sets the parameters of weights."""
    activation_observer: ObserverName | None = None
    """The statistic that sets the parameters of activations."""
    weight_signed: bool | None = None
    """Signed symmetric weights."""
    bias_correction: bool | None = None
    """Restore the mean and the deviation of each output channel of a weight."""
    low_rank: bool | None = None
    """Add a float term of low rank to each weight (aiqvit)."""
    power_of_two_factor: bool | None = None
    """Give the channels of LayerNorms' inputs and outputs scales that differ by powers of two."""
    integer_layer_norm: bool | None = None
    """Compute LayerNorm in integers; it needs the power-of-two factors."""
    log_int_softmax: bool | None = None
    """Compute softmax in integers, with attention maps in powers of two."""
    quantize_input: bool | None = None
    """Quantize the image."""
    overrides: dict[str, Any] = Field(default_factory=dict)
    """By site name or pattern (blocks.*.mlp.fc1.weight), fields of a site to change such as {bits: 4}, or null to leave
    it in float; later patterns win."""


def resolve(config: RecipeConfig, sites: tuple[Site, ...]) -> Recipe:
    """Resolves a recipe configuration against the sites of an architecture.

    Args:
        config: The user's configuration.
        sites: Every site of the architecture, in the order of the forward pass.

    Returns:
        The recipe. Its remarks say where it does not do what its preset asks for.

    Raises:
        InputError: For an unknown preset, quantizer, observer or field, a width out of range, a pattern that matches no
            site, and a choice that would have no effect or no meaning at a site.

    Example:
        >>> recipe = resolve(RecipeConfig(weight_bits=4), sites_of(architecture))
        >>> recipe.sites["blocks.0.attn.qkv.weight"].bits
        4
    """
    preset_name = config.preset or DEFAULT_PRESET
    if preset_name not in PRESETS:
        raise InputError(f"unknown recipe preset '{preset_name}'{did_you_mean(preset_name, PRESETS)}")
    preset = PRESETS[preset_name]
    for field in ("weight_observer", "activation_observer"):
        if getattr(config, field) is not None:
            OBSERVER_RULES.find(getattr(config, field), f"recipe.{field}")
    known = {site.name: site for site in sites}

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
        if site.kind == "image" and not choice("quantize_input"):
            continue
        if preset.scope == "matmuls":
            wanted = site.role == "weight" or site.name in read
        else:
            wanted = site.kind not in ("operand", "hidden")
        if not wanted:
            continue
        spec = by_kind.get(site.kind, activation)
        if site.name in normalized:
            spec = dataclasses.replace(spec, quantizer=preset.normalized_weight)
        if site.kind == "image" and preset.input_bits is not None:
            spec = dataclasses.replace(spec, bits=preset.input_bits)
        reads_image = any(known[name].kind == "image" for name in site.reads)
        if site.role == "weight" and reads_image and preset.image_weight_per_channel is not None:
            spec = dataclasses.replace(spec, per_channel=preset.image_weight_per_channel)
        if site.role == "weight" and preset.weight_parts:
            spec = dataclasses.replace(spec, parts=_count_pieces(known[site.layer_name], sites))
        specs[site.name] = spec
    for pattern, change in config.overrides.items():
        _override(specs, pattern, change, sites, activation)
    for name, spec in specs.items():
        _check(name, spec, known[name])
        if spec.per_channel and not keeps_channels(known[name], sites):
            raise InputError(f"{name}: its channels are not those of what reads it; set per_channel: false")
    remarks: tuple[str, ...] = ()
    if choice("integer_layer_norm") and not factor:
        remarks = (
            f"LayerNorm runs in float arithmetic: preset {preset_name} asks for integer arithmetic, which needs the "
            "power-of-two factors that recipe.power_of_two_factor turns off.",
        )
    integer_layer_norm = choice("integer_layer_norm") and factor
    return Recipe(preset_name, specs, integer_layer_norm, log_softmax, preset.scope, remarks, known)


def _count_pieces(output: Site, sites: tuple[Site, ...]) -> int:
    """Returns the number of operands of matmuls that a layer's output is cut into; 1 if it is not cut."""
    return max(1, sum(site.kind == "operand" and site.source == output.name for site in sites))


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
    """Rejects flags that would have no effect.

    Raises:
        InputError: For such a flag.
    """
    if PRESETS[preset].scope == "matmuls":
        for name in ("power_of_two_factor", "integer_layer_norm", "log_int_softmax"):
            if getattr(config, name):
                raise InputError(
                    f"recipe.{name} is true, but preset {preset} quantizes only what matmuls read; leave it out, or "
                    "set recipe.preset to one that quantizes the whole network"
                )
    if config.integer_layer_norm and not factor:
        raise InputError(
            "recipe.integer_layer_norm is true, but its arithmetic needs power-of-two factors; "
            "set recipe.power_of_two_factor to true, or leave it out"
        )


def _check(name: str, spec: SiteSpec, site: Site) -> None:
    shape = site.shape
    if not (isinstance(spec.bits, int) and MIN_BITS <= spec.bits <= MAX_BITS):
        raise InputError(f"{name}: {spec.bits} bits asked for; widths from {MIN_BITS} to {MAX_BITS} are supported")
    quantizer, observer = QUANTIZER_RULES.get(spec.quantizer), OBSERVER_RULES.get(spec.observer)
    if observer is None:
        raise InputError(f"{name}: unknown observer '{spec.observer}'{did_you_mean(spec.observer, OBSERVER_RULES)}")
    if quantizer is None:
        raise InputError(f"{name}: unknown quantizer '{spec.quantizer}'{did_you_mean(spec.quantizer, QUANTIZER_RULES)}")
    if quantizer.attention_only and site.kind != "softmax":
        raise InputError(f"{name}: a {spec.quantizer} quantizer is for attention maps; set another quantizer")
    if observer.per_channel is True and not spec.per_channel:
        raise InputError(f"{name}: observer '{spec.observer}' needs per_channel: true")
    if observer.per_channel is False and spec.per_channel:
        raise InputError(
            f"{name}: observer '{spec.observer}' works per tensor; set per_channel: false or another observer"
        )
    if not isinstance(spec.parts, int) or spec.parts < 1 or shape[-1] % spec.parts:
        raise InputError(f"{name}: its {shape[-1]} channels do not make {spec.parts} equal parts; set another parts")
    if spec.per_head and len(shape) != 4:
        raise InputError(
            f"{name}: per_head is for tensors with an axis of heads, which this one lacks; set it to false"
        )
    if spec.per_channel + (spec.parts > 1) + spec.per_head > 1:
        raise InputError(f"{name}: per_channel, parts and per_head exclude each other; set one of them")
    if spec.parts > 1 and spec.bias_correction:
        raise InputError(f"{name}: bias_correction needs one scale per channel or tensor; set parts: 1")
    if (spec.parts > 1 or spec.per_head) and not observer.grouped:
        raise InputError(f"{name}: observer '{spec.observer}' knows neither parts nor per_head; set observer: method")
    if quantizer.method_only and spec.observer != "method":
        raise InputError(f"{name}: a {spec.quantizer} quantizer is set by a method's search; set observer: method")
