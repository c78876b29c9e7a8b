"""Simulated quantization on integer codes. Without quantizers it is the float model."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from cptv_jax.interpreters.arithmetic import PRECISION, Arithmetic
from cptv_jax.interpreters.integer_functions import integer_layer_norm, log_int_softmax_exponents
from cptv_jax.interpreters.tensor import Accumulated, Tensor
from cptv_jax.quantizers import (
    BiasCorrected,
    Log2,
    LowRank,
    Moments,
    Quantizer,
    Uniform,
    moments,
    rounded_product,
    spread,
    true_divide,
)
from cptv_jax.recipe.sites import weight_site

_SQRT_HALF = 0.5**0.5
_LAST_BYTE_COUNTS = 2.0**23


def _product(*factors: Array | float | None) -> Array | None:
    """Returns the product of the factors that are present, in their order; None if there are none."""
    result: Array | float = 1.0
    present = [factor for factor in factors if factor is not None]
    for factor in present:
        result = result * factor
    return jnp.asarray(result, jnp.float32) if present else None


class Weight(NamedTuple):
    """A linear layer's weight as its matmul reads it.

    Attributes:
        kernel: [inputs, outputs], in steps or values.
        gain: [outputs]; bias correction multiplies the product by it.
        shift: [outputs]; bias correction adds it to every weight of an output channel.
        low_rank: [inputs, rank] and [rank, outputs], the factors of a float term that is added to the weight.
    """

    kernel: Tensor
    gain: Array | None = None
    shift: Array | None = None
    low_rank: tuple[Array, Array] | None = None


def _uint8(x: Array) -> Array:
    """Returns integers from 0 to 255 as uint8."""

    def last_byte(x: Array) -> Array:
        # After adding 2^23 the last byte of a float32 holds the last 8 binary digits before the point. XLA's CPU
        # backend fuses a plain conversion with the operations that read the result into slow programs (YNNPACK's).
        bits = jax.lax.bitcast_convert_type(x + _LAST_BYTE_COUNTS, jnp.uint32)
        return bits.astype(jnp.uint8)

    return jax.lax.platform_dependent(x, cpu=last_byte, default=lambda x: x.astype(jnp.uint8))


def store_codes(quantizer: Uniform, codes: Array) -> Tensor:
    """Stores codes of a uniform quantizer as uint8.

    Args:
        quantizer: The quantizer.
        codes: Its codes, integers in float32 [...].

    Returns:
        A tensor of uint8, counted from the quantizer's lowest code.
    """
    scale, zero = spread(quantizer.scale, codes), spread(quantizer.zero_point - quantizer.low, codes)
    return Tensor(_uint8(codes - quantizer.low), scale, zero)


def quantize_tensor(quantizer: Quantizer, values: Array) -> Tensor:
    """Quantizes values.

    Args:
        quantizer: The quantizer.
        values: Float32 [...].

    Returns:
        A tensor of uint8 codes for a uniform quantizer, of float32 steps for any other.
    """
    if isinstance(quantizer, Uniform):
        return store_codes(quantizer, quantizer.codes(values))
    return Tensor(quantizer.steps(values), quantizer.scale)


def quantize_weight(
    quantizer: Quantizer,
    kernel: Array,
    wanted: Moments | None = None,
    quantize: Callable[[Quantizer, Array], Tensor] = quantize_tensor,
) -> Weight:
    """Quantizes the kernel of a linear layer.

    Args:
        quantizer: The weight's quantizer.
        kernel: Float32 [inputs, outputs].
        wanted: The kernel's moments, where bias correction should not compute them again.
        quantize: Quantizes the codes themselves; decides how they are stored.

    Returns:
        A weight that `FakeQuant` can be given in place of the float kernel.
    """
    if isinstance(quantizer, BiasCorrected):
        weight = quantize(quantizer.base, kernel)
        return Weight(weight, *quantizer.correction(wanted or moments(kernel), weight.steps))
    if isinstance(quantizer, LowRank):
        return Weight(quantize(quantizer.base, kernel), low_rank=quantizer.factors)
    return Weight(quantize(quantizer, kernel))


def effective_weight(weight: Weight) -> Array:
    """Computes the matrix that a linear layer multiplies its input by, all corrections included.

    Args:
        weight: The layer's weight.

    Returns:
        Float32 [inputs, outputs].
    """
    kernel = weight.kernel.steps if weight.kernel.scale is None else weight.kernel.steps * weight.kernel.scale
    if weight.gain is not None:
        kernel = kernel * weight.gain
    if weight.shift is not None:
        kernel = kernel + weight.shift
    if weight.low_rank is not None:
        kernel = kernel + jnp.matmul(*weight.low_rank, precision=PRECISION)
    return kernel


class FakeQuant:
    """Runs the operations with every site that has a quantizer quantized, and all other sites in float32.

    Tensors hold codes, and matmuls multiply steps instead of values and apply the scales afterwards: sums of integers
    do not depend on the order of summation, so a candidate's result does not depend on what else shares its batch.

    Args:
        quantizers: By site, relative to the stage.
        weights: Quantized weights by site; a layer that has one here ignores its float kernel.
        arithmetic: How codes are multiplied; every arithmetic gives the same numbers.
        integer_layer_norm: Whether LayerNorms whose input is quantized run in integer arithmetic.
        log_int_softmax: Whether softmaxes whose input is quantized run in integer arithmetic.
        rounding: False leaves every value unrounded and every weight float, yet marks tensors with their scales, so
            that the integer functions above still act. The published code calls this its full-precision model.
        all_tokens: Whether to compute also the tokens that no later stage reads.
    """

    def __init__(
        self,
        quantizers: Mapping[str, Quantizer],
        *,
        weights: Mapping[str, Weight] = MappingProxyType({}),
        arithmetic: Arithmetic = Arithmetic(),  # noqa: B008 - frozen
        integer_layer_norm: bool = False,
        log_int_softmax: bool = False,
        rounding: bool = True,
        all_tokens: bool = False,
    ) -> None:
        self.quantizers = quantizers
        self.weights = weights
        self.arithmetic = arithmetic
        self.integer_layer_norm = integer_layer_norm
        self.log_int_softmax = log_int_softmax
        self.rounding = rounding
        self.all_tokens = all_tokens

    def emit(self, site: str, kind: str, x: Tensor) -> Tensor:
        """Quantizes an operation's result, if its site is quantized.

        Args:
            site: The site, relative to the stage.
            kind: The site's kind, see `cptv_jax.recipe.sites.Kind`.
            x: The operation's result. Products of codes arrive as sums of products of steps, with the product of the
                scales: always from a matmul, and from a linear layer if nothing is added to them.

        Returns:
            The tensor that the following operations read.
        """
        quantizer = self.quantizers.get(site)
        if quantizer is None:
            return Tensor(x.values)
        if not self.rounding:
            return Tensor(true_divide(x.values, quantizer.scale), quantizer.scale)
        return quantize_tensor(quantizer, x.values)

    def weight(self, layer: str, kernel: Array) -> Weight:
        """Finds or computes a linear layer's weight.

        Args:
            layer: The layer, relative to the stage.
            kernel: Its float kernel [inputs, outputs].

        Returns:
            The quantized weight that was given for this layer, or the kernel, quantized if its site is.
        """
        site = weight_site(layer)
        if site in self.weights:
            return self.weights[site]
        quantizer = self.quantizers.get(site)
        if quantizer is None or not self.rounding:
            return Weight(Tensor(kernel))
        return quantize_weight(quantizer, kernel)

    def tensor(self, site: str, x: Tensor) -> Tensor:
        """Returns the tensor, quantized if its site is; see `Operations.tensor`."""
        return self.emit(site, "tensor", x)

    def operand(self, site: str, x: Tensor) -> Tensor:
        """Returns the operand, quantized if its site is; see `Operations.operand`."""
        return self.emit(site, "operand", x) if site in self.quantizers else x

    def linear(self, site: str, kernel: Array, bias: Array | None, x: Tensor, *, hidden: bool = False) -> Tensor:
        """Returns a linear layer's result, quantized if its site is; see `Operations.linear`."""
        return self.emit(site, "hidden" if hidden else "linear", self.linear_product(site, kernel, bias, x))

    def linear_product(self, site: str, kernel: Array, bias: Array | None, x: Tensor) -> Tensor:
        """Computes a linear layer without quantizing its result.

        Args:
            site: The layer's site, relative to the stage.
            kernel: [inputs, outputs].
            bias: [outputs], or None.
            x: [..., inputs].

        Returns:
            A tensor [..., outputs].
        """
        if x.scale is not None and x.scale.ndim:  # a scale per input channel cannot wait until after the sum
            x = Tensor(x.values)
        weight, gain, shift, low_rank = self.weight(site, kernel)
        sums, scale = self.arithmetic.matmul_weight(x, weight), _product(x.scale, weight.scale, gain)
        # Rounded here, so that a product of values is not contracted with the bias either.
        product = Tensor(rounded_product(sums, 1.0)) if scale is None else Tensor(sums, scale)
        if shift is None and low_rank is None and bias is None:
            return product
        y = product.values
        if shift is not None:
            y = y + Tensor(self.arithmetic.row_sums(x), _product(x.scale, shift)).values
        if low_rank is not None:
            down, up = low_rank
            y = y + jnp.matmul(jnp.matmul(x.values, down, precision=PRECISION), up, precision=PRECISION)
        return Tensor(y if bias is None else y + bias)

    def matmul(self, site: str, a: Tensor, b: Tensor, factor: float = 1.0) -> Tensor:
        """Returns a product of activations, quantized if its site is; see `Operations.matmul`."""
        return self.emit(site, "matmul", self.matmul_product(a, b, factor))

    def matmul_product(self, a: Tensor, b: Tensor, factor: float) -> Tensor:
        """Computes a product of activations without quantizing it.

        Args:
            a: [..., rows, inner].
            b: [..., inner, columns].
            factor: Multiplies the product.

        Returns:
            A tensor [..., rows, columns].
        """
        return Accumulated(self.arithmetic.matmul(a, b), _product(a.scale, b.scale, factor))

    def runs_integer_layer_norm(self, site: str, x: Tensor) -> bool:
        """Decides whether a LayerNorm runs in integer arithmetic.

        Args:
            site: Its site, relative to the stage.
            x: Its input.

        Returns:
            True if that is enabled, the input has a scale, and the site has a uniform quantizer.
        """
        return self.integer_layer_norm and x.scale is not None and isinstance(self.quantizers.get(site), Uniform)

    def runs_integer_softmax(self, site: str, x: Tensor) -> bool:
        """Decides whether a softmax runs in integer arithmetic.

        Args:
            site: Its site, relative to the stage.
            x: Its input.

        Returns:
            True if that is enabled, the input has a scale, and the site has a log2 quantizer.
        """
        return self.log_int_softmax and x.scale is not None and isinstance(self.quantizers.get(site), Log2)

    def layer_norm(self, site: str, weight: Array, bias: Array, epsilon: float, x: Tensor) -> Tensor:
        """Returns a LayerNorm's result, quantized if its site is; see `Operations.layer_norm`."""
        quantizer = self.quantizers.get(site)
        if self.runs_integer_layer_norm(site, x):
            assert isinstance(quantizer, Uniform) and x.scale is not None
            steps = integer_layer_norm(x.steps, x.scale, weight, bias, quantizer.scale)
            return store_codes(quantizer, quantizer.clip(steps)) if self.rounding else Tensor(steps, quantizer.scale)
        values = x.values
        centred = values - jnp.mean(values, -1, keepdims=True)
        variance = jnp.mean(centred**2, -1, keepdims=True)
        normalized = rounded_product(centred * jax.lax.rsqrt(variance + epsilon), weight) + bias
        return self.emit(site, "layer_norm", Tensor(normalized))

    def softmax(self, site: str, x: Tensor) -> Tensor:
        """Returns a softmax's result, quantized if its site is; see `Operations.softmax`."""
        quantizer = self.quantizers.get(site)
        if self.runs_integer_softmax(site, x):
            assert isinstance(quantizer, Log2) and x.scale is not None
            codes = quantizer.clip_exponents(log_int_softmax_exponents(true_divide(x.values, x.scale), x.scale))
            return Tensor(quantizer.values(codes))
        return self.emit(site, "softmax", Tensor(jax.nn.softmax(x.values, -1)))

    def gelu(self, site: str, x: Tensor) -> Tensor:
        """Returns a GELU's result, quantized if its site is; see `Operations.gelu`."""
        values = x.values
        # Written with erf, as PyTorch does; the erfc form of jax.nn.gelu takes three times as long on a CPU.
        return self.emit(site, "gelu", Tensor(0.5 * values * (1.0 + jax.lax.erf(values * _SQRT_HALF))))

    def add(self, site: str, x: Tensor, y: Tensor) -> Tensor:
        """Returns a sum, quantized if its site is; see `Operations.add`."""
        return self.emit(site, "add", Tensor(x.values + y.values))

    def first(self, x: Tensor, count: int | None, axis: int) -> Tensor:
        """Returns the first entries of an axis, or all with `all_tokens`; see `Operations.first`."""
        if count is None or self.all_tokens:
            return x
        return x.move(lambda a: jax.lax.slice_in_dim(a, 0, count, axis=axis))


class Float(FakeQuant):
    """The full-precision model: no site is quantized."""

    def __init__(self) -> None:
        super().__init__({})
