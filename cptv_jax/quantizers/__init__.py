"""Quantizers: pure maps between values and integer codes, each a pytree of its parameters."""

from cptv_jax.quantizers.base import Quantizer, ScaledQuantizer, WrappedQuantizer, unwrap
from cptv_jax.quantizers.bias_correction import BiasCorrected, Moments, moments
from cptv_jax.quantizers.dual_uniform import DualUniform
from cptv_jax.quantizers.focusing import Focusing
from cptv_jax.quantizers.free import LARGEST_EXPONENT, Free, free_from_plain, free_to_plain, move_candidate
from cptv_jax.quantizers.logarithmic import Log2, LogSqrt2
from cptv_jax.quantizers.low_rank import LowRank, RankSearch
from cptv_jax.quantizers.registry import QUANTIZER_CLASSES, name_of_quantizer, register_quantizer
from cptv_jax.quantizers.rounding import rounded_product, true_divide
from cptv_jax.quantizers.straight_through import round_through, straight_through
from cptv_jax.quantizers.twin import TwinGelu, TwinSoftmax, twin_softmax
from cptv_jax.quantizers.uniform import FractionalUniform, OffsetUniform, Uniform, grid, spread

__all__ = [
    "LARGEST_EXPONENT",
    "QUANTIZER_CLASSES",
    "BiasCorrected",
    "DualUniform",
    "Focusing",
    "FractionalUniform",
    "Free",
    "Log2",
    "LogSqrt2",
    "LowRank",
    "Moments",
    "OffsetUniform",
    "Quantizer",
    "RankSearch",
    "ScaledQuantizer",
    "TwinGelu",
    "TwinSoftmax",
    "Uniform",
    "WrappedQuantizer",
    "free_from_plain",
    "free_to_plain",
    "grid",
    "moments",
    "move_candidate",
    "name_of_quantizer",
    "register_quantizer",
    "round_through",
    "rounded_product",
    "spread",
    "straight_through",
    "true_divide",
    "twin_softmax",
    "unwrap",
]
