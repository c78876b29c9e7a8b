"""LayerNorm and softmax in FQ-ViT's integer arithmetic, on tensors measured in steps."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from cptv_jax.quantizers import rounded_product, true_divide

# Second-order polynomial of I-BERT (equation 11) for exp on (-ln 2, 0], and its number of fractional bits.
_EXP_COEFFICIENTS = (0.35815147, 0.96963238, 1.0)
_MINUS_LN2 = -0.6931
_EXP_BITS = 30
_MULTIPLIER_BITS = 8

# Layout of IEEE 754 single precision.
_FRACTION_BITS = 23
_EXPONENT_OFFSET = 127


def _power_of_two(exponent: Float[Array, "..."]) -> Float[Array, "..."]:
    """Returns 2^exponent for integral exponents from -126 to 127. Writing the exponent bits is exact; exp2 rounds."""
    bits = (exponent.astype(jnp.int32) + _EXPONENT_OFFSET) << _FRACTION_BITS
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


def _floor_log2(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Returns floor(log2 x) for finite normal x > 0, exactly, by reading the exponent bits; -127 for zero."""
    bits = jax.lax.bitcast_convert_type(x, jnp.int32)
    return ((bits >> _FRACTION_BITS) - _EXPONENT_OFFSET).astype(jnp.float32)


def integer_layer_norm(
    steps: Float[Array, "... channels"],
    scale: Float[Array, "..."],
    weight: Float[Array, " channels"],
    bias: Float[Array, " channels"],
    out_scale: Float[Array, "..."],
) -> Float[Array, "... channels"]:
    """Computes LayerNorm by multiply and shift, in integer arithmetic (FQ-ViT, section 3.2, equation 8).

    The published code divides by zero for a token whose channels are all equal, which has no deviation. Here such a
    token normalizes to zero, so that only the bias remains.

    Args:
        steps: The input in units of scale, float32 [..., channels].
        scale: Input units per step: a scalar, or [channels] with each a power-of-two multiple of the smallest
            (power-of-two factor).
        weight: [channels].
        bias: [channels].
        out_scale: Units of the result, a scalar or [channels].

    Returns:
        Integral steps of out_scale, float32 [..., channels]. They are not clamped: the quantizer that owns out_scale
        clamps them.
    """
    channels = steps.shape[-1]
    smallest = jnp.min(scale)
    shifted = jnp.round(steps) * jnp.round(true_divide(scale, smallest))
    total = jnp.sum(shifted, -1, keepdims=True)
    mean = true_divide(total, channels) * smallest
    spread = channels * jnp.sum(shifted**2, -1, keepdims=True) - total**2
    constant = spread <= 0
    deviation = smallest / channels * jnp.sqrt(jnp.where(constant, 1.0, spread))

    multiplier = true_divide(jnp.where(constant, 0.0, smallest / deviation) * weight, out_scale)
    magnitude = jnp.abs(multiplier)
    shift = _power_of_two(jnp.clip(_MULTIPLIER_BITS - 1 - _floor_log2(magnitude), 0, 31))
    mantissa = jnp.clip(jnp.floor(magnitude * shift), 0, 2**_MULTIPLIER_BITS - 1)
    offset = rounded_product(jnp.where(constant, 0.0, mean / deviation), weight)
    intercept = jnp.round(true_divide(bias - offset, out_scale) * shift)
    return jnp.round((jnp.sign(multiplier) * mantissa * shifted + intercept) / shift)


def _integer_exp(steps: Float[Array, "..."], scale: Float[Array, ""]) -> Float[Array, "..."]:
    """Returns exp(steps * scale) for steps <= 0, up to a common factor (I-BERT, algorithm 2)."""
    a, b, c = _EXP_COEFFICIENTS
    ln2 = jnp.floor(_MINUS_LN2 / scale)
    steps = jnp.maximum(steps, _EXP_BITS * ln2)
    quotient = jnp.floor(true_divide(steps, ln2))
    remainder = steps - ln2 * quotient
    polynomial = remainder * (remainder + jnp.floor((b / a) / scale)) + jnp.floor((c / a) / scale**2)
    return jnp.maximum(jnp.floor(polynomial * _power_of_two(_EXP_BITS - quotient)), 0.0)


def log_int_softmax_exponents(steps: Float[Array, "... keys"], scale: Float[Array, ""]) -> Float[Array, "... keys"]:
    """Computes -log2 of softmax(steps * scale), rounded to integers (FQ-ViT, section 3.3, equation 13).

    The quotient sum / exp is rounded, then its logarithm is rounded by the bit below the leading one.
    Intermediate "integers" reach 2^40, beyond float32's 24 bits, exactly as in the published code.

    Args:
        steps: Scores in units of scale, float32 [..., keys].
        scale: Input units per step.

    Returns:
        Exponents, float32 [..., keys]; infinity where the softmax is zero.
    """
    exponentials = _integer_exp(steps - jnp.max(steps, -1, keepdims=True), scale)
    quotient = jnp.round(jnp.sum(exponentials, -1, keepdims=True) / exponentials)
    finite = jnp.isfinite(quotient)
    safe = jnp.where(finite, quotient, 1.0)
    floor = _floor_log2(safe)
    round_up = safe - _power_of_two(floor) >= _power_of_two(floor - 1)
    # Where the exponential is zero the quotient is infinite: the softmax is zero, its exponent beyond every grid.
    return jnp.where(finite, floor + round_up, jnp.inf)
