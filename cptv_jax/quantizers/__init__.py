"""Quantizers: pure maps between values and integer codes, each a pytree of its parameters."""

from cptv_jax.quantizers.base import Quantizer
from cptv_jax.quantizers.bias_correction import BiasCorrected, Moments, moments
from cptv_jax.quantizers.dual_uniform import DualUniform
from cptv_jax.quantizers.logarithmic import Log2, LogSqrt2
from cptv_jax.quantizers.rounding import rounded_product, true_divide
from cptv_jax.quantizers.uniform import FractionalUniform, OffsetUniform, Uniform, grid

__all__ = [
    "BiasCorrected",
    "DualUniform",
    "FractionalUniform",
    "Log2",
    "LogSqrt2",
    "Moments",
    "OffsetUniform",
    "Quantizer",
    "Uniform",
    "grid",
    "moments",
    "rounded_product",
    "true_divide",
]
