"""Exact products of integer codes: three ways to multiply, one result."""

import math
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from cptv_jax.interpreters.tensor import Tensor

ArithmeticName = Literal["float32", "bf16-codes", "int8"]
ARITHMETICS: tuple[ArithmeticName, ...] = ("float32", "bf16-codes", "int8")

PRECISION = jax.lax.Precision.HIGHEST  # full float32, also where the hardware defaults to less
_EXACT = 2**24  # integers up to here are exact in float32, and so are sums of integers that stay below it
_SIGN = 128  # a uint8 code minus this is an int8


@dataclass(frozen=True)
class Arithmetic:
    """The way in which codes are multiplied.

    All three ways give the same float32 numbers, bit for bit: a contraction longer than the bound is cut into parts
    that are exact each, and the parts are added in order. All need integral zero points.

    Attributes:
        name: "float32": steps as float32, the reference. "bf16-codes": steps, at most 255 in magnitude, as bfloat16,
            which holds them exactly, with float32 sums. "int8": codes as int8, with int32 sums and zero-point
            corrections.
        weight_bits: The width of the widest weight codes.
        activation_bits: The width of the widest activation codes. The two widths bound a product and so the number of
            products whose sum is exact in float32.
        approximate: Whether values that are not codes are multiplied as bfloat16, with float32 sums, instead of as
            float32.
    """

    name: ArithmeticName = "float32"
    weight_bits: int = 8
    activation_bits: int = 8
    approximate: bool = False

    def exact_terms(self, bits: int) -> int:
        """Computes how many products of codes always sum to less than 2^24, which float32 holds exactly.

        Args:
            bits: The width of the other factor; the first has activation_bits.

        Returns:
            The number of products.
        """
        return _EXACT // ((2**self.activation_bits - 1) * (2**bits - 1))

    def matmul_weight(self, x: Tensor, weight: Tensor) -> Float[Array, "... outputs"]:
        """Multiplies activations by a weight.

        Args:
            x: Activations [..., inputs].
            weight: [inputs, outputs].

        Returns:
            x @ weight in units of both scales, float32 [..., outputs].
        """
        return self._matmul(x, weight, self.weight_bits)

    def row_sums(self, x: Tensor) -> Float[Array, "... 1"]:
        """Sums steps over the last axis.

        Args:
            x: Activations [..., inputs].

        Returns:
            Sums of x's steps, float32 [..., 1].
        """
        if self.name == "bf16-codes" and x.zero is not None:  # the operand that matmul_weight has computed already
            return jnp.matmul(
                _bf16(x.steps), jnp.ones((x.shape[-1], 1), jnp.bfloat16), preferred_element_type=jnp.float32
            )
        return jnp.sum(x.steps, -1, keepdims=True)

    def matmul(self, a: Tensor, b: Tensor) -> Float[Array, "... rows columns"]:
        """Multiplies two activations over their last two axes.

        Args:
            a: [..., rows, inner].
            b: [..., inner, columns].

        Returns:
            a @ b in units of both scales, float32 [..., rows, columns].
        """
        return self._matmul(a, b, self.activation_bits)

    def _matmul(self, a: Tensor, b: Tensor, bits: int) -> Array:
        if a.zero is None or b.zero is None:
            if self.approximate:
                return _dot(round_to_bf16(a.steps), round_to_bf16(b.steps), jnp.float32)
            return jnp.matmul(a.steps, b.steps, precision=PRECISION)
        inputs = a.shape[-1]
        size = math.ceil(inputs / math.ceil(inputs / self.exact_terms(bits)))
        product = {"float32": _float32, "bf16-codes": _bf16_codes, "int8": _int8}[self.name]
        total = None
        for start in range(0, inputs, size):
            part = product(
                a.move(lambda x, i=start: x[..., i : i + size]),  # type: ignore[misc]
                b.move(lambda x, i=start: x[..., i : i + size, :]),  # type: ignore[misc]
            )
            total = part if total is None else total + part
        assert total is not None
        return total


def _float32(a: Tensor, b: Tensor) -> Array:
    return jnp.matmul(a.steps, b.steps, precision=PRECISION)


def _bf16(x: Array) -> Array:
    """Returns integers of at most 8 bits as bfloat16."""

    def upper_half(x: Array) -> Array:  # cutting off bits is several times as fast as a conversion on a CPU
        bits = jax.lax.bitcast_convert_type(x, jnp.uint32) >> 16
        return jax.lax.bitcast_convert_type(bits.astype(jnp.uint16), jnp.bfloat16)

    return jax.lax.platform_dependent(x, cpu=upper_half, default=lambda x: x.astype(jnp.bfloat16))


def round_to_bf16(x: Float[Array, "..."]) -> Array:
    """Rounds finite values to bfloat16: to the nearest, on a CPU with halves away from zero.

    There it is as fast as the conversion of integers. Other backends round by their own conversion.

    Args:
        x: Finite values, float32 [...].

    Returns:
        bfloat16 [...].
    """

    def upper_half(x: Array) -> Array:
        bits = (jax.lax.bitcast_convert_type(x, jnp.uint32) + 0x8000) >> 16
        return jax.lax.bitcast_convert_type(bits.astype(jnp.uint16), jnp.bfloat16)

    return jax.lax.platform_dependent(x, cpu=upper_half, default=lambda x: x.astype(jnp.bfloat16))


def _bf16_codes(a: Tensor, b: Tensor) -> Array:
    return _dot(_bf16(a.steps), _bf16(b.steps), jnp.float32)


def _dot(a: Array, b: Array, dtype: Any) -> Array:
    """Returns jnp.matmul(a, b), computed for attention in the layout [batch, tokens, heads, channels] of its operands.

    XLA then transposes once; otherwise it folds the transposes into a product that its CPU backend widens to float32.
    """
    if a.ndim != 4 or b.ndim != 4:
        return jnp.matmul(a, b, preferred_element_type=dtype)
    a, b = a.transpose(0, 2, 1, 3), b.transpose(0, 3, 1, 2)
    return jax.lax.dot_general(a, b, (((3,), (3,)), ((0, 2), (0, 2))), preferred_element_type=dtype)


def _int8(a: Tensor, b: Tensor) -> Array:
    """Returns sum (a - za)(b - zb) = sum ab - za sum b - zb sum a + n za zb, in int32, on codes minus 128."""
    assert a.zero is not None and b.zero is not None
    codes_a, codes_b = ((x.stored.astype(jnp.int16) - _SIGN).astype(jnp.int8) for x in (a, b))
    zero_a, zero_b = (x.zero.astype(jnp.int32) - _SIGN for x in (a, b))  # type: ignore[union-attr]
    products = jnp.matmul(codes_a, codes_b, preferred_element_type=jnp.int32)
    sums_a = jnp.sum(codes_a, -1, keepdims=True, dtype=jnp.int32)
    sums_b = jnp.sum(codes_b, -2, keepdims=True, dtype=jnp.int32)
    corrected = products - zero_a * sums_b - zero_b * sums_a + codes_a.shape[-1] * zero_a * zero_b
    return corrected.astype(jnp.float32)
