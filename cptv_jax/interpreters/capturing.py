"""Execution that keeps what linear layers and matmuls read and produced, for methods that work layer by layer."""

from collections.abc import Collection, Mapping
from typing import Any

from jaxtyping import Array

from cptv_jax.interpreters.fake_quant import FakeQuant
from cptv_jax.interpreters.tensor import Tensor
from cptv_jax.quantizers import Quantizer


class Capturing(FakeQuant):
    """FakeQuant (or, without quantizers, the float model) that keeps inputs and outputs of operations.

    Args:
        quantizers: By site, relative to the stage.
        wanted: The linear layers and matmuls to keep, relative to the stage.
        offsets: By site, an array to add to the output of an operation in a float stage; the gradient with respect to
            an offset of zeros is the gradient with respect to that output.
        **settings: Further arguments of FakeQuant.

    Attributes:
        inputs: By site a tuple of values: the one input of a linear layer, both operands of a matmul.
        outputs: By site, the values that the operation emitted.
        factors: By site, the factor of a matmul.
    """

    def __init__(
        self,
        quantizers: Mapping[str, Quantizer],
        wanted: Collection[str],
        *,
        offsets: Mapping[str, Array] | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(quantizers, **settings)
        self.wanted = wanted
        self.offsets = offsets or {}
        self.inputs: dict[str, tuple[Array, ...]] = {}
        self.outputs: dict[str, Array] = {}
        self.factors: dict[str, float] = {}

    def linear(self, site: str, kernel: Array, bias: Array | None, x: Tensor, *, hidden: bool = False) -> Tensor:
        """Returns a linear layer's output and keeps its values; see `Operations.linear`."""
        return self._keep(site, super().linear(site, kernel, bias, x, hidden=hidden), x)

    def matmul(self, site: str, a: Tensor, b: Tensor, factor: float = 1.0) -> Tensor:
        """Returns a product of activations and keeps its values; see `Operations.matmul`."""
        self.factors[site] = factor
        return self._keep(site, super().matmul(site, a, b, factor), a, b)

    def _keep(self, site: str, output: Tensor, *inputs: Tensor) -> Tensor:
        if site in self.offsets:
            output = Tensor(output.values + self.offsets[site])
        if site in self.wanted:
            self.inputs[site] = tuple(x.values for x in inputs)
            self.outputs[site] = output.values
        return output
