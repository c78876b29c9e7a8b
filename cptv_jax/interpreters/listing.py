"""The sites of a forward pass, found by tracing it."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import jax
from jaxtyping import Array

from cptv_jax.interpreters.fake_quant import FakeQuant, Weight
from cptv_jax.interpreters.tensor import Tensor
from cptv_jax.recipe.sites import Site, weight_site


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class _Named(Tensor):
    """A tensor that knows the site it comes from, through reshapes and slices."""

    site: str = field(default="", metadata={"static": True})


def _origin(*tensors: Tensor) -> tuple[str, ...]:
    return tuple(tensor.site for tensor in tensors if isinstance(tensor, _Named))


class _Listing(FakeQuant):
    """Runs in float and notes every site that is passed, by full name."""

    def __init__(self, stage: str) -> None:
        super().__init__({}, all_tokens=True)
        self.stage = stage
        self.sites: dict[str, Site] = {}

    def emit(self, site: str, kind: str, values: Array) -> Tensor:
        found = Site(self.stage, site, kind, values.shape)  # type: ignore[arg-type]
        self.sites[found.name] = found
        return _Named(values, site=found.name)

    def weight(self, layer: str, kernel: Array) -> Weight:
        self.emit(layer, "weight", kernel)
        return Weight(Tensor(kernel))

    def operand(self, site: str, x: Tensor) -> Tensor:
        output, name = self.emit(site, "operand", x.values), f"{self.stage}.{site}"
        self.sites[name] = replace(self.sites[name], source="".join(_origin(x)))
        return output

    def linear(self, site: str, kernel: Array, bias: Array | None, x: Tensor, *, hidden: bool = False) -> Tensor:
        output = super().linear(site, kernel, bias, x, hidden=hidden)
        self._reads(weight_site(site), x)
        return output

    def matmul(self, site: str, a: Tensor, b: Tensor, factor: float = 1.0) -> Tensor:
        output = super().matmul(site, a, b, factor)
        self._reads(site, a, b)
        return output

    def _reads(self, site: str, *tensors: Tensor) -> None:
        name = f"{self.stage}.{site}"
        self.sites[name] = replace(self.sites[name], reads=_origin(*tensors))


def list_sites(forward: Callable[..., Any], stage: str, *inputs: Any) -> tuple[tuple[Site, ...], Any]:
    """The sites of one stage, in the order they are reached, and the abstract output of the stage.

    forward(operations, *inputs) is traced, not run; inputs may be abstract. Site names get the stage's name in front.
    """
    listing = _Listing(stage)
    output = jax.eval_shape(lambda *args: forward(listing, *args), *inputs)
    return tuple(listing.sites.values()), output
