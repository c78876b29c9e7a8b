"""The operations that architectures are written in. An interpreter gives them their meaning."""

from typing import Protocol

from jaxtyping import Array, Float

from cptv_jax.interpreters.tensor import Tensor


class Operations(Protocol):
    """The operations that a model's modules call instead of computing by themselves.

    Each call names a site, relative to its stage: the tensor that the operation produces. Whether, and how, that tensor
    is quantized is the interpreter's business. A linear layer's weight is a site too, `weight_site(site)`. No two calls
    in a stage may name one site, and the site of a linear layer or LayerNorm is its path in the stage's module.

    Between operations a tensor may be reshaped, transposed and sliced (`Tensor.move`). A module that computes anything
    else makes a new tensor from `Tensor.values` and names it with `tensor`.
    """

    def tensor(self, site: str, x: Tensor) -> Tensor:
        """Names a tensor that no operation below produces: the input image, the position embedding, a concatenation.

        Args:
            site: The tensor's site.
            x: The tensor.

        Returns:
            The tensor that the following operations read.
        """

    def operand(self, site: str, x: Tensor) -> Tensor:
        """Names a part of a tensor on its way into a matmul (query, key, value).

        Args:
            site: The part's site.
            x: The part.

        Returns:
            The tensor that the matmul reads.
        """

    def linear(
        self,
        site: str,
        kernel: Float[Array, "inputs outputs"],
        bias: Float[Array, " outputs"] | None,
        x: Tensor,
        *,
        hidden: bool = False,
    ) -> Tensor:
        """Computes x @ kernel + bias over the last axis.

        Args:
            site: The layer's site.
            kernel: [inputs, outputs].
            bias: [outputs], or None.
            x: [..., inputs].
            hidden: Whether only an activation function reads the result; recipes then leave it in float.

        Returns:
            A tensor [..., outputs].
        """

    def matmul(self, site: str, a: Tensor, b: Tensor, factor: float = 1.0) -> Tensor:
        """Computes factor * a @ b over the last two axes of two activations.

        Args:
            site: The product's site.
            a: [..., rows, inner].
            b: [..., inner, columns].
            factor: Multiplies the product.

        Returns:
            A tensor [..., rows, columns].
        """

    def layer_norm(
        self, site: str, weight: Float[Array, " channels"], bias: Float[Array, " channels"], epsilon: float, x: Tensor
    ) -> Tensor:
        """Computes LayerNorm over the last axis.

        Args:
            site: The LayerNorm's site.
            weight: [channels].
            bias: [channels].
            epsilon: Added to the variance.
            x: [..., channels].

        Returns:
            A tensor of x's shape.
        """

    def softmax(self, site: str, x: Tensor) -> Tensor:
        """Computes softmax over the last axis.

        Args:
            site: The result's site.
            x: The tensor.

        Returns:
            A tensor of x's shape.
        """

    def gelu(self, site: str, x: Tensor) -> Tensor:
        """Computes the exact (erf) GELU.

        Args:
            site: The result's site.
            x: The tensor.

        Returns:
            A tensor of x's shape.
        """

    def first(self, x: Tensor, count: int | None, axis: int) -> Tensor:
        """Takes the first entries of an axis, where nothing reads the others.

        Args:
            x: The tensor.
            count: How many entries are read; None means all.
            axis: The axis.

        Returns:
            The entries; an interpreter that needs to see every token may return x whole.
        """

    def add(self, site: str, x: Tensor, y: Tensor) -> Tensor:
        """Adds two tensors (a residual connection).

        Args:
            site: The sum's site.
            x: The first tensor.
            y: The second tensor, of the same shape (or one that broadcasts with it).

        Returns:
            The sum.
        """
