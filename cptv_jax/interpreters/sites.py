"""The sites of a forward pass, found by tracing it."""

from collections.abc import Callable
from typing import Any

import jax
from jaxtyping import Array

from cptv_jax.interpreters.fake_quant import FakeQuant
from cptv_jax.interpreters.tensor import Tensor
from cptv_jax.sites import Site


class _Listing(FakeQuant):
    """Runs in float and notes every site that is passed."""

    def __init__(self) -> None:
        super().__init__({})
        self.sites: dict[str, tuple[str, tuple[int, ...]]] = {}

    def emit(self, site: str, kind: str, values: Array) -> Tensor:
        self.sites[site] = (kind, values.shape)
        return Tensor(values)

    def weight(self, site: str, kernel: Array) -> tuple[Tensor, Array | None, Array | None]:
        self.sites[site] = ("weight", kernel.shape)
        return Tensor(kernel), None, None

    def operand(self, site: str, x: Tensor) -> Tensor:
        return self.emit(site, "operand", x.values)


def list_sites(forward: Callable[..., Any], stage: str, *inputs: Any) -> tuple[tuple[Site, ...], Any]:
    """The sites of one stage, in the order they are reached, and the abstract output of the stage.

    forward(operations, *inputs) is traced, not run; inputs may be abstract. Site names get the stage's name in front.
    """
    listing = _Listing()
    output = jax.eval_shape(lambda *args: forward(listing, *args), *inputs)
    sites = tuple(Site(f"{stage}.{name}", kind, shape) for name, (kind, shape) in listing.sites.items())  # type: ignore[arg-type]
    return sites, output
