"""Execution that can be differentiated: the numbers of FakeQuant, with straight-through derivatives."""

import jax
import jax.numpy as jnp
from jaxtyping import Array

from cptv_jax.interpreters.fake_quant import FakeQuant, Weight, quantize_weight
from cptv_jax.interpreters.tensor import Tensor
from cptv_jax.quantizers import Quantizer, spread, straight_through

_SMALLEST_VARIANCE = 1e-12  # of a constant token, whose LayerNorm has no derivative


def _in_steps(quantizer: Quantizer, values: Array) -> Tensor:
    return Tensor(quantizer.steps(values), spread(quantizer.scale, values))


class StraightThrough(FakeQuant):
    """FakeQuant on steps in float32, where FakeQuant's uint8 codes have no derivative.

    Quantizers have straight-through derivatives of their own; integer LayerNorm and softmax get those of their float
    forms. Weights are quantized here, from their float kernels.
    """

    def emit(self, site: str, kind: str, values: Array) -> Tensor:
        quantizer = self.quantizers.get(site)
        return Tensor(values) if quantizer is None else _in_steps(quantizer, values)

    def weight(self, site: str, kernel: Array) -> Weight:
        quantizer = self.quantizers.get(site)
        if quantizer is None:
            return Weight(Tensor(kernel))
        return quantize_weight(quantizer, kernel, quantized=_in_steps)

    def layer_norm(self, site: str, weight: Array, bias: Array, epsilon: float, x: Tensor) -> Tensor:
        exact = super().layer_norm(site, weight, bias, epsilon, x)
        if exact.zero is None:  # it ran in float
            return exact
        assert exact.scale is not None
        centred = x.values - jnp.mean(x.values, -1, keepdims=True)
        variance = jnp.mean(centred**2, -1, keepdims=True) + _SMALLEST_VARIANCE
        smooth = self.emit(site, "layer_norm", centred * jax.lax.rsqrt(variance) * weight + bias)
        return Tensor(straight_through(exact.steps, smooth.steps), exact.scale)

    def softmax(self, site: str, x: Tensor) -> Tensor:
        exact = super().softmax(site, x)
        if not self.log_int_softmax or exact.scale is not None:
            return exact
        return Tensor(straight_through(exact.values, jax.nn.softmax(x.values, -1)))
