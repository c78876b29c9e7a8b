"""Layers with weights that every family can be built from, as Flax NNX modules.

A layer is called as layer(operations, site, x). The site must be the layer's path in its stage (`self.attn.qkv` is
"attn.qkv"), because methods look up a site's arrays by its name.
"""

import jax.numpy as jnp
from flax import nnx

from cptv_jax.interpreters.operations import Operations
from cptv_jax.interpreters.tensor import Tensor


class Linear(nnx.Module):
    """Weights of a linear layer: kernel [inputs, outputs], bias [outputs]."""

    def __init__(self, inputs: int, outputs: int, *, bias: bool = True, rngs: nnx.Rngs) -> None:
        self.kernel = nnx.Param(nnx.initializers.truncated_normal(0.02)(rngs.params(), (inputs, outputs)))
        self.bias = nnx.Param(jnp.zeros(outputs)) if bias else None

    def __call__(self, ops: Operations, site: str, x: Tensor, *, hidden: bool = False) -> Tensor:
        bias = None if self.bias is None else self.bias[...]
        return ops.linear(site, self.kernel[...], bias, x, hidden=hidden)


class LayerNorm(nnx.Module):
    """Weights of a LayerNorm over `width` channels."""

    def __init__(self, width: int, epsilon: float) -> None:
        self.weight = nnx.Param(jnp.ones(width))
        self.bias = nnx.Param(jnp.zeros(width))
        self.epsilon = epsilon

    def __call__(self, ops: Operations, site: str, x: Tensor) -> Tensor:
        return ops.layer_norm(site, self.weight[...], self.bias[...], self.epsilon, x)
