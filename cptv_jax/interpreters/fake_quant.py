"""Simulated quantization in float32, on integer-valued steps. Without quantizers it is the float model."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array

from cptv_jax.interpreters.integer_functions import integer_layer_norm, log_int_softmax_exponents
from cptv_jax.interpreters.tensor import Tensor
from cptv_jax.quantizers import BiasCorrected, Log2, Quantizer, Uniform, true_divide

_PRECISION = jax.lax.Precision.HIGHEST  # float32 is meant, also where the hardware would prefer less

_SQRT_HALF = 0.5**0.5


def _product(*factors: Array | float | None) -> Array | float:
    """Product of the factors that are present, small ones first so that scales are combined before tensors."""
    result: Array | float = 1.0
    for factor in factors:
        if factor is not None:
            result = result * factor
    return result


class FakeQuant:
    """Runs the operations with every site in `quantizers` quantized and all other sites in float32.

    quantizers: by site, relative to the stage.
    integer_layer_norm: LayerNorms whose input is quantized run in integer arithmetic.
    log_int_softmax: softmaxes whose input is quantized run in integer arithmetic.
    rounding: False leaves every value unrounded and every weight float, yet marks tensors with their scales, so
        that the integer functions above still act. This is what the published code calls its full-precision model.

    Matmuls multiply steps, not values, and apply the scales afterwards: sums of integers do not depend on the order
    of summation, so one candidate's result does not depend on what else shares its batch.
    """

    def __init__(
        self,
        quantizers: Mapping[str, Quantizer],
        *,
        integer_layer_norm: bool = False,
        log_int_softmax: bool = False,
        rounding: bool = True,
    ) -> None:
        self.quantizers = quantizers
        self.integer_layer_norm = integer_layer_norm
        self.log_int_softmax = log_int_softmax
        self.rounding = rounding

    def emit(self, site: str, kind: str, values: Array) -> Tensor:
        """The tensor produced at a site, quantized if the site is."""
        quantizer = self.quantizers.get(site)
        if quantizer is None:
            return Tensor(values)
        if not self.rounding:
            return Tensor(true_divide(values, quantizer.scale), quantizer.scale)
        return Tensor(quantizer.steps(values), quantizer.scale)

    def weight(self, site: str, kernel: Array) -> tuple[Tensor, Array | None, Array | None]:
        """A kernel's steps, and the gain and shift that bias correction adds after the matmul."""
        quantizer = self.quantizers.get(site)
        if quantizer is None or not self.rounding:
            return Tensor(kernel), None, None
        steps = quantizer.steps(kernel)
        if isinstance(quantizer, BiasCorrected):
            return Tensor(steps, quantizer.scale), *quantizer.correction(kernel, steps)
        return Tensor(steps, quantizer.scale), None, None

    def tensor(self, site: str, x: Tensor) -> Tensor:
        return self.emit(site, "tensor", x.values)

    def operand(self, site: str, x: Tensor) -> Tensor:
        return self.emit(site, "operand", x.values) if site in self.quantizers else x

    def linear(self, site: str, kernel: Array, bias: Array | None, x: Tensor, *, hidden: bool = False) -> Tensor:
        if x.scale is not None and x.scale.ndim:  # a scale per input channel cannot wait until after the sum
            x = Tensor(x.values)
        weight, gain, shift = self.weight(f"{site}.weight", kernel)
        y = jnp.matmul(x.steps, weight.steps, precision=_PRECISION) * _product(x.scale, weight.scale, gain)
        if shift is not None:
            y = y + jnp.sum(x.steps, -1, keepdims=True) * _product(x.scale, shift)
        return self.emit(site, "hidden" if hidden else "linear", y if bias is None else y + bias)

    def matmul(self, site: str, a: Tensor, b: Tensor, factor: float = 1.0) -> Tensor:
        y = jnp.matmul(a.steps, b.steps, precision=_PRECISION)
        return self.emit(site, "matmul", y * _product(a.scale, b.scale, factor))

    def layer_norm(self, site: str, weight: Array, bias: Array, epsilon: float, x: Tensor) -> Tensor:
        quantizer = self.quantizers.get(site)
        if self.integer_layer_norm and x.scale is not None and isinstance(quantizer, Uniform):
            steps = integer_layer_norm(x.steps, x.scale, weight, bias, quantizer.scale)
            return Tensor(quantizer.clip_steps(steps) if self.rounding else steps, quantizer.scale)
        values = x.values
        centred = values - jnp.mean(values, -1, keepdims=True)
        variance = jnp.mean(centred**2, -1, keepdims=True)
        return self.emit(site, "layer_norm", centred * jax.lax.rsqrt(variance + epsilon) * weight + bias)

    def softmax(self, site: str, x: Tensor) -> Tensor:
        quantizer = self.quantizers.get(site)
        if self.log_int_softmax and x.scale is not None and isinstance(quantizer, Log2):
            codes = quantizer.clip_exponents(log_int_softmax_exponents(true_divide(x.values, x.scale), x.scale))
            return Tensor(quantizer.values(codes))
        return self.emit(site, "softmax", jax.nn.softmax(x.values, -1))

    def gelu(self, site: str, x: Tensor) -> Tensor:
        values = x.values
        # Written with erf as PyTorch does; jax.nn.gelu's erfc form takes three times as long on CPU.
        return self.emit(site, "gelu", 0.5 * values * (1.0 + jax.lax.erf(values * _SQRT_HALF)))

    def add(self, site: str, x: Tensor, y: Tensor) -> Tensor:
        return self.emit(site, "add", x.values + y.values)


class Float(FakeQuant):
    """The full-precision model: no site is quantized."""

    def __init__(self) -> None:
        super().__init__({})
