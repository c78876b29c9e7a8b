"""Execution that keeps what linear layers and matmuls read and produced, for methods that work layer by layer."""

from collections.abc import Collection, Mapping
from typing import Any

from jaxtyping import Array

from cptv_jax.interpreters.fake_quant import FakeQuant
from cptv_jax.interpreters.tensor import Tensor
from cptv_jax.quantizers import Quantizer


class Capturing(FakeQuant):
    """FakeQuant (or, without quantizers, the float model) whose `inputs` and `outputs` hold values by site.

    wanted: the linear layers and matmuls to keep, relative to the stage. inputs[site] is a tuple: of a linear layer
    its one input, of a matmul both operands. outputs[site] is what the operation emitted. factors[site]: of a matmul.
    offsets: by site, what to add to the output of an operation in a float stage; the gradient with respect to an offset
        of zeros is the gradient with respect to that output.
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
        return self._keep(site, super().linear(site, kernel, bias, x, hidden=hidden), x)

    def matmul(self, site: str, a: Tensor, b: Tensor, factor: float = 1.0) -> Tensor:
        self.factors[site] = factor
        return self._keep(site, super().matmul(site, a, b, factor), a, b)

    def _keep(self, site: str, output: Tensor, *inputs: Tensor) -> Tensor:
        if site in self.offsets:
            output = Tensor(output.values + self.offsets[site])
        if site in self.wanted:
            self.inputs[site] = tuple(x.values for x in inputs)
            self.outputs[site] = output.values
        return output
