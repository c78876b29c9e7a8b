"""The operations an architecture is written in. An interpreter gives them their meaning."""

from typing import Protocol

from jaxtyping import Array, Float

from cptv_jax.interpreters.tensor import Tensor


class Operations(Protocol):
    """Each call names a site, relative to its stage: the tensor that the operation produces.

    Whether, and how, that tensor is quantized is the interpreter's business. A linear layer's weight is the site
    `{site}.weight`.
    """

    def tensor(self, site: str, x: Tensor) -> Tensor:
        """A tensor that no operation below produces: the input image, the position embedding, a concatenation."""

    def operand(self, site: str, x: Tensor) -> Tensor:
        """A part of a tensor on its way into a matmul (query, key, value)."""

    def linear(
        self,
        site: str,
        kernel: Float[Array, "inputs outputs"],
        bias: Float[Array, " outputs"] | None,
        x: Tensor,
        *,
        hidden: bool = False,
    ) -> Tensor:
        """x @ kernel + bias over the last axis; hidden says that only an activation function reads the result."""

    def matmul(self, site: str, a: Tensor, b: Tensor, factor: float = 1.0) -> Tensor:
        """factor * a @ b over the last two axes, both operands activations."""

    def layer_norm(
        self, site: str, weight: Float[Array, " channels"], bias: Float[Array, " channels"], epsilon: float, x: Tensor
    ) -> Tensor:
        """LayerNorm over the last axis."""

    def softmax(self, site: str, x: Tensor) -> Tensor:
        """Softmax over the last axis."""

    def gelu(self, site: str, x: Tensor) -> Tensor:
        """Exact (erf) GELU."""

    def first(self, x: Tensor, count: int | None, axis: int) -> Tensor:
        """The first `count` entries of an axis, where nothing reads the others; all of them for None.

        An interpreter that wants to see every token may return x whole.
        """

    def add(self, site: str, x: Tensor, y: Tensor) -> Tensor:
        """Residual addition."""
