"""Execution that fits every quantizer to the first tensor that reaches it."""

from collections.abc import Callable, Mapping

from jaxtyping import Array

from cptv_jax.interpreters.fake_quant import FakeQuant, Weight
from cptv_jax.interpreters.tensor import Tensor
from cptv_jax.quantizers import Quantizer
from cptv_jax.recipe.sites import weight_site
from cptv_jax.recipe.spec import SiteSpec


class Initializing(FakeQuant):
    """FakeQuant whose quantizers are fitted as their sites are reached, on tensors from quantized predecessors.

    Args:
        specs: The sites to quantize, relative to the stage; the others stay in float.
        fit: Makes the quantizer of a tensor from its specification and values.

    Attributes:
        fitted: The quantizers made so far, by site.
    """

    def __init__(self, specs: Mapping[str, SiteSpec], fit: Callable[[SiteSpec, Array], Quantizer]) -> None:
        self.fitted: dict[str, Quantizer] = {}
        super().__init__(self.fitted, all_tokens=True)
        self.specs = specs
        self.fit = fit

    def _fit(self, site: str, values: Array) -> None:
        if site in self.specs:
            self.fitted[site] = self.fit(self.specs[site], values)

    def emit(self, site: str, kind: str, x: Tensor) -> Tensor:
        """Returns an operation's result, quantized by the quantizer fitted to it; see `FakeQuant.emit`."""
        self._fit(site, x.values)
        return super().emit(site, kind, x)

    def operand(self, site: str, x: Tensor) -> Tensor:
        """Returns an operand, quantized by the quantizer fitted to it; see `Operations.operand`."""
        return self.emit(site, "operand", x) if site in self.specs else x

    def weight(self, layer: str, kernel: Array) -> Weight:
        """Returns a linear layer's weight, quantized by the quantizer fitted to it; see `FakeQuant.weight`."""
        self._fit(weight_site(layer), kernel)
        return super().weight(layer, kernel)
