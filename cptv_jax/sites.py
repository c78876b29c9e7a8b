"""Sites: the named places where a forward pass can be quantized."""

from dataclasses import dataclass
from typing import Literal

Kind = Literal["weight", "tensor", "operand", "linear", "hidden", "matmul", "layer_norm", "softmax", "gelu", "add"]


@dataclass(frozen=True)
class Site:
    """A named place where a tensor can be quantized.

    kind: the operation that produces it. "hidden" is a linear layer's output that only a GELU reads; "operand" a
        piece of a tensor on its way into a matmul.
    shape: of the tensor; the leading axis of an activation is the batch.
    reads: of a weight, the site whose tensor its layer multiplies it with; of a matmul, the sites of both operands; of
        other kinds, nothing.
    """

    name: str
    kind: Kind
    shape: tuple[int, ...]
    reads: tuple[str, ...] = ()
