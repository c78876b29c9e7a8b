"""The sites of a forward pass, found by tracing it."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import jax
from jaxtyping import Array

from cptv_jax.errors import InputError
from cptv_jax.interpreters.fake_quant import FakeQuant, Weight
from cptv_jax.interpreters.tensor import Tensor
from cptv_jax.recipe.sites import Site, full_name, weight_site


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class _Named(Tensor):
    """A tensor that knows the site it comes from, through reshapes and slices."""

    site: str = field(default="", metadata={"static": True})


def _list_origins(*tensors: Tensor) -> tuple[str, ...]:
    """Returns the sites that tensors come from."""
    return tuple(tensor.site for tensor in tensors if isinstance(tensor, _Named))


class _Listing(FakeQuant):
    """Runs in float and notes every site that the pass reaches, by full name."""

    def __init__(self, stage: str) -> None:
        super().__init__({}, all_tokens=True)
        self.stage = stage
        self.sites: dict[str, Site] = {}

    def emit(self, site: str, kind: str, x: Tensor) -> Tensor:
        found = Site(self.stage, site, kind, x.shape)  # type: ignore[arg-type]
        if found.name in self.sites:
            raise InputError(f"two operations of stage {self.stage} have the site '{found.local}'; name them apart")
        self.sites[found.name] = found
        return _Named(x.values, site=found.name)

    def weight(self, layer: str, kernel: Array) -> Weight:
        self.emit(layer, "weight", Tensor(kernel))
        return Weight(Tensor(kernel))

    def operand(self, site: str, x: Tensor) -> Tensor:
        output, name = self.emit(site, "operand", x), full_name(self.stage, site)
        self.sites[name] = replace(self.sites[name], source="".join(_list_origins(x)))
        return output

    def linear(self, site: str, kernel: Array, bias: Array | None, x: Tensor, *, hidden: bool = False) -> Tensor:
        output = super().linear(site, kernel, bias, x, hidden=hidden)
        self._note_reads(weight_site(site), x)
        return output

    def matmul(self, site: str, a: Tensor, b: Tensor, factor: float = 1.0) -> Tensor:
        output = super().matmul(site, a, b, factor)
        self._note_reads(site, a, b)
        return output

    def _note_reads(self, site: str, *tensors: Tensor) -> None:
        name = full_name(self.stage, site)
        self.sites[name] = replace(self.sites[name], reads=_list_origins(*tensors))


def list_sites(forward: Callable[..., Any], stage: str, *inputs: Any) -> tuple[tuple[Site, ...], Any]:
    """Finds the sites of one stage by tracing it.

    Args:
        forward: The stage, called as forward(operations, *inputs); it is traced, not run.
        stage: The stage's name.
        *inputs: The stage's inputs; shapes are enough.

    Returns:
        The sites, in the order that the stage reaches them, and the stage's abstract output.

    Raises:
        InputError: If two operations have the same site.
    """
    listing = _Listing(stage)
    output = jax.eval_shape(lambda *args: forward(listing, *args), *inputs)
    return tuple(listing.sites.values()), output
