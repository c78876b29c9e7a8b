"""The specification of a quantized site: quantizer, bits, granularity."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial

import jax

from cptv_jax.errors import InputError, did_you_mean
from cptv_jax.recipe.sites import Site
from cptv_jax.registry import Registry

MIN_BITS, MAX_BITS = 2, 8

ObserverName = str
"""A name in OBSERVER_RULES."""
QuantizerName = str
"""A name in QUANTIZER_RULES."""


@dataclass(frozen=True)
class QuantizerRules:
    """Where a recipe may ask for a quantizer.

    Attributes:
        attention_only: Its levels are those of values from 0 to 1, so only attention maps (softmax sites) can have it.
        method_only: Only the search of a base method sets its parameters, so its observer must be "method".
    """

    attention_only: bool = False
    method_only: bool = False


@dataclass(frozen=True)
class ObserverRules:
    """Where a recipe may ask for an observer.

    Attributes:
        per_channel: Whether the site must have a scale for each channel (True) or for the whole tensor (False); None
            allows both.
        grouped: Whether it can set a scale for each part of a tensor or for each attention head.
    """

    per_channel: bool | None = None
    grouped: bool = False


QUANTIZER_RULES: Registry[QuantizerRules] = Registry("quantizer")
OBSERVER_RULES: Registry[ObserverRules] = Registry("observer")

QUANTIZER_RULES.register("uniform", QuantizerRules())
QUANTIZER_RULES.register("dual-uniform", QuantizerRules())
QUANTIZER_RULES.register("log2", QuantizerRules(attention_only=True))
QUANTIZER_RULES.register("log-sqrt2", QuantizerRules(attention_only=True))
QUANTIZER_RULES.register("focusing", QuantizerRules(attention_only=True))
QUANTIZER_RULES.register("twin-softmax", QuantizerRules(attention_only=True, method_only=True))
QUANTIZER_RULES.register("twin-gelu", QuantizerRules(method_only=True))
OBSERVER_RULES.register("minmax", ObserverRules())
OBSERVER_RULES.register("ema", ObserverRules())
OBSERVER_RULES.register("percentile", ObserverRules(per_channel=False))
OBSERVER_RULES.register("omse", ObserverRules())
OBSERVER_RULES.register("ptf", ObserverRules(per_channel=True))
OBSERVER_RULES.register("method", ObserverRules(grouped=True))


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

    Attributes:
        quantizer: A name in QUANTIZER_RULES, which users' own quantizers join (see `cptv_jax.calibration.observers`).
        bits: Width of the codes, 2 to 8.
        signed: Codes from -2^(bits-1) instead of from 0.
        symmetric: Zero point 0 and a range mirrored around zero.
        per_channel: One scale for each entry of the last axis (a weight's output channels, a token's features).
        parts: Number of equal parts of the last axis that have a scale each (3: a qkv weight's query, key and value).
        per_head: One scale for each attention head (operands of attention's matmuls).
        observer: The calibration statistic that sets scale and zero point, a name in OBSERVER_RULES; "method" leaves
            them to the base method's own search.
        bias_correction: Whether each output channel's mean and deviation are restored (weights only).
        low_rank: Whether a float term of low rank is added (weights only).

    Example:
        >>> SiteSpec(bits=4, per_channel=True, observer="omse").bits
        4
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
class Recipe:
    """Every quantized site with its specification, and the arithmetic of LayerNorm and softmax.

    Attributes:
        name: The preset's name.
        sites: The specification of every quantized site, by the site's name.
        integer_layer_norm: Whether LayerNorms between quantized sites run in integer arithmetic.
        log_int_softmax: Whether softmaxes between quantized sites run in integer arithmetic.
        scope: "full" or "matmuls", see Preset.
        remarks: Sentences on where the recipe departs from its preset because of other choices, for reports.
        places: Every site of the architecture by name, quantized or not, with its stage, layer and role.

    Raises:
        InputError: For a specification of a site that the architecture lacks.

    Example:
        >>> recipe = resolve(RecipeConfig(weight_bits=4), sites_of(architecture))
        >>> list(recipe.of_stage("blocks.0"))[:2]
        ['norm1', 'attn.qkv.weight']
    """

    name: str
    sites: Mapping[str, SiteSpec]
    integer_layer_norm: bool
    log_int_softmax: bool
    scope: str = "full"
    remarks: tuple[str, ...] = ()
    places: Mapping[str, Site] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        for name in self.sites:
            if name not in self.places:
                raise InputError(
                    f"recipe {self.name} quantizes {name}, which is not a site of its places"
                    f"{did_you_mean(name, self.places)}; give it the architecture's sites (site_table)"
                )

    def of_stage(self, stage: str) -> dict[str, SiteSpec]:
        """Selects the specifications of one stage.

        Args:
            stage: The stage's name.

        Returns:
            By site name relative to the stage, in the order of `sites`.
        """
        return {self.places[name].local: spec for name, spec in self.sites.items() if self.places[name].stage == stage}
