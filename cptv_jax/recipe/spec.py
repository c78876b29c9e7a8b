"""What a recipe says of a site: quantizer, bits, granularity."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Literal

import jax

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
