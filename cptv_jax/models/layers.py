"""Layers with weights that every family can be built from, as Flax NNX modules.

A layer is called as layer(operations, site, x). The site must be the layer's path in its stage (`self.attn.qkv` is
"attn.qkv"), because methods look up a site's arrays by its name.
"""

import jax.numpy as jnp
from flax import nnx

from cptv_jax.interpreters.operations import Operations
from cptv_jax.interpreters.tensor import Tensor


class Linear(nnx.Module):
    """A linear layer.

    Args:
        inputs: Channels that it reads.
        outputs: Channels that it produces.
        bias: Whether it has a bias.
        rngs: Random numbers for the kernel.

    Attributes:
        kernel: [inputs, outputs], float32.
        bias: [outputs], float32, or None.
    """

    def __init__(self, inputs: int, outputs: int, *, bias: bool = True, rngs: nnx.Rngs) -> None:
        self.kernel = nnx.Param(nnx.initializers.truncated_normal(0.02)(rngs.params(), (inputs, outputs)))
        self.bias = nnx.Param(jnp.zeros(outputs)) if bias else None

    def __call__(self, ops: Operations, site: str, x: Tensor, *, hidden: bool = False) -> Tensor:
        """Runs the layer.

        Args:
            ops: The interpreter.
            site: The layer's path in its stage.
            x: [..., inputs].
            hidden: Whether only an activation function reads the result.

        Returns:
            A tensor [..., outputs].
        """
        bias = None if self.bias is None else self.bias[...]
        return ops.linear(site, self.kernel[...], bias, x, hidden=hidden)


class LayerNorm(nnx.Module):
    """A LayerNorm over the last axis.

    Args:
        width: Channels.
        epsilon: Added to the variance.

    Attributes:
        weight: [width], float32.
        bias: [width], float32.
    """

    def __init__(self, width: int, epsilon: float) -> None:
        self.weight = nnx.Param(jnp.ones(width))
        self.bias = nnx.Param(jnp.zeros(width))
        self.epsilon = epsilon

    def __call__(self, ops: Operations, site: str, x: Tensor) -> Tensor:
        """Runs the layer.

        Args:
            ops: The interpreter.
            site: The layer's path in its stage.
            x: [..., width].

        Returns:
            A tensor of x's shape.
        """
        return ops.layer_norm(site, self.weight[...], self.bias[...], self.epsilon, x)
