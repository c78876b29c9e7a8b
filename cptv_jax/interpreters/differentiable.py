"""Execution that can be differentiated: the numbers of FakeQuant, with straight-through derivatives."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Self

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from cptv_jax.interpreters.arithmetic import PRECISION, round_to_bf16
from cptv_jax.interpreters.fake_quant import FakeQuant, Weight, effective_weight, quantize_tensor, quantize_weight
from cptv_jax.interpreters.tensor import Tensor
from cptv_jax.quantizers import Quantizer, spread, straight_through
from cptv_jax.recipe.sites import weight_site

_SMALLEST_VARIANCE = 1e-12  # keeps the derivative finite for a constant token, whose LayerNorm has none


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Traced(Tensor):
    """A quantized tensor whose values have a derivative.

    Attributes:
        slope: The same values as float32, with the derivative that the codes lack.
    """

    slope: Float[Array, "..."] | None = None

    @property
    def values(self) -> Float[Array, "..."]:
        """The values in input units, float32, with their derivative."""
        assert self.slope is not None
        return self.slope

    def move(self, movement: Callable[[Array], Array]) -> Self:
        """Reshapes, transposes or slices codes and values alike.

        Args:
            movement: Applied to both arrays.

        Returns:
            The moved tensor.
        """
        assert self.slope is not None
        return replace(self, stored=movement(self.stored), slope=movement(self.slope))


def _store_steps(quantizer: Quantizer, values: Array) -> Tensor:
    return Tensor(quantizer.steps(values), spread(quantizer.scale, values))


def _add_slope(exact: Tensor, quantizer: Quantizer, values: Array) -> Traced:
    """Returns an exact tensor with the derivative that its quantizer has at the values."""
    smooth = quantizer.steps(values) * spread(quantizer.scale, values)
    return Traced(exact.stored, exact.scale, exact.zero, straight_through(exact.values, smooth))


def _drop_slope(x: Tensor) -> Tensor:
    """Returns the tensor that FakeQuant would have, without a derivative."""
    return jax.lax.stop_gradient(Tensor(x.stored, x.scale, x.zero))


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _product(a: Array, b: Array, dtype: Any) -> Array:
    """Returns a @ b; only its derivative is ever computed: products of `dtype` with float32 sums.

    A gradient only proposes candidates and the true loss decides, so bfloat16 is enough, and several times as fast.
    """
    return jnp.matmul(a, b, precision=PRECISION)


def _product_forward(a: Array, b: Array, dtype: Any) -> tuple[Array, tuple[Array, Array]]:
    return _product(a, b, dtype), (a, b)


def _product_backward(dtype: Any, operands: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
    narrow = round_to_bf16 if dtype == jnp.bfloat16 else lambda x: x
    a, b, g = (narrow(x) for x in (*operands, gradient))
    batch = tuple(range(b.ndim - 2))
    product = partial(jax.lax.dot_general, precision=PRECISION, preferred_element_type=jnp.float32)
    left = product(g, b, (((g.ndim - 1,), (b.ndim - 1,)), (batch, batch)))
    shared = tuple(range(len(batch), a.ndim - 1))  # a weight is shared by all axes of `a` except the last
    return left, product(a, g, ((shared, shared), (batch, batch)))


_product.defvjp(_product_forward, _product_backward)


class StraightThrough(FakeQuant):
    """FakeQuant with derivatives; its numbers are those of FakeQuant, bit for bit.

    Every result is computed twice: from codes without a derivative, and from values with one. The compiler drops
    everything of the second computation except the derivative. Quantizers have straight-through derivatives of their
    own; integer LayerNorm and softmax get the derivatives of their float forms. Weights are quantized here, from their
    float kernels.
    """

    @property
    def _dtype(self) -> Any:
        return jnp.bfloat16 if self.arithmetic.name == "bf16-codes" else jnp.float32

    def emit(self, site: str, kind: str, x: Tensor) -> Tensor:
        """Returns an operation's result, quantized with a derivative; see `FakeQuant.emit`."""
        quantizer, values = self.quantizers.get(site), x.values
        if quantizer is None:
            return Tensor(values)
        return _add_slope(quantize_tensor(*jax.lax.stop_gradient((quantizer, values))), quantizer, values)

    def linear_product(self, site: str, kernel: Array, bias: Array | None, x: Tensor) -> Tensor:
        """Returns a linear layer's result before its quantizer; see `FakeQuant.linear_product`."""
        exact = super().linear_product(site, *jax.lax.stop_gradient((kernel, bias)), _drop_slope(x)).values
        quantizer = self.quantizers.get(weight_site(site))
        weight = Weight(Tensor(kernel)) if quantizer is None else quantize_weight(quantizer, kernel, None, _store_steps)
        smooth = _product(x.values, effective_weight(weight), self._dtype)
        return Tensor(straight_through(exact, smooth if bias is None else smooth + bias))

    def weight(self, layer: str, kernel: Array) -> Weight:
        """Returns a linear layer's weight without a derivative; see `FakeQuant.weight`."""
        return jax.lax.stop_gradient(super().weight(layer, kernel))

    def matmul_product(self, a: Tensor, b: Tensor, factor: float) -> Tensor:
        """Returns a product of activations before its quantizer; see `FakeQuant.matmul_product`."""
        exact = super().matmul_product(_drop_slope(a), _drop_slope(b), factor).values
        return Tensor(straight_through(exact, _product(a.values, b.values, self._dtype) * factor))

    def layer_norm(self, site: str, weight: Array, bias: Array, epsilon: float, x: Tensor) -> Tensor:
        """Returns a LayerNorm's result, with the derivative of its float form; see `Operations.layer_norm`."""
        quantizer = self.quantizers.get(site)
        if quantizer is None or not self.runs_integer_layer_norm(site, x):
            return super().layer_norm(site, weight, bias, epsilon, x)
        exact = super().layer_norm(site, *jax.lax.stop_gradient((weight, bias)), epsilon, _drop_slope(x))
        centred = x.values - jnp.mean(x.values, -1, keepdims=True)
        variance = jnp.mean(centred**2, -1, keepdims=True) + _SMALLEST_VARIANCE
        return _add_slope(exact, quantizer, centred * jax.lax.rsqrt(variance) * weight + bias)

    def softmax(self, site: str, x: Tensor) -> Tensor:
        """Returns a softmax's result, with the derivative of its float form; see `Operations.softmax`."""
        if not self.runs_integer_softmax(site, x):
            return super().softmax(site, x)
        exact = super().softmax(site, _drop_slope(x))
        return Tensor(straight_through(exact.values, jax.nn.softmax(x.values, -1)))
