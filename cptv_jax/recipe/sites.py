"""Sites: the named places where a forward pass can be quantized."""

import math
from collections.abc import Iterable
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
    source: of an operand, the site that it is a piece of.
    """

    name: str
    kind: Kind
    shape: tuple[int, ...]
    reads: tuple[str, ...] = ()
    source: str = ""


@dataclass(frozen=True)
class Product:
    """A matmul of a forward pass: its multiplications for one image, and the sites of its operands."""

    multiplications: int
    operands: tuple[str, ...]


def products(sites: Iterable[Site]) -> tuple[Product, ...]:
    """Every linear layer and matmul, as if the head read all tokens of the last block."""
    known = {site.name: site for site in sites}
    found = []
    for site in known.values():
        if site.kind == "weight":
            output = known[site.name.removesuffix(".weight")]
            found.append(Product(math.prod(output.shape[1:]) * site.shape[0], (*site.reads, site.name)))
        elif site.kind == "matmul":
            terms = known[site.reads[0]].shape[-1]
            found.append(Product(math.prod(site.shape[1:]) * terms, site.reads))
    return tuple(found)


def keeps_channels(site: Site, sites: Iterable[Site]) -> bool:
    """Whether a scale for each channel of a tensor can be applied where the tensor is read: not where its channels are
    cut into heads or patches, nor where a matmul of activations sums over them.
    """
    channels = site.shape[-1]
    for reader in sites:
        if reader.source == site.name and reader.shape[-1] != channels:
            return False
        if reader.kind == "weight" and site.name in reader.reads and reader.shape[0] != channels:
            return False
        if reader.kind == "matmul" and site.name in reader.reads:
            first, second = reader.reads
            if site.name == first or (site.name == second and reader.shape[-1] != channels):
                return False
    return True


def layer_norm_readers(sites: Iterable[Site]) -> dict[str, tuple[str, ...]]:
    """By LayerNorm inside the network, the weights of the linear layers that read it.

    The last LayerNorm, which the head reads, is left out, and so is one whose channels a layer does not see unchanged.
    """
    known = {site.name: site for site in sites}
    norms = {name for name, site in known.items() if site.kind == "layer_norm" and not name.startswith("head.")}
    readers: dict[str, list[str]] = {}
    for site in known.values():
        for name in norms.intersection(site.reads):
            readers.setdefault(name, []).append(site.name)

    def direct(norm: str, reader: str) -> bool:
        return known[reader].kind == "weight" and known[reader].shape[0] == known[norm].shape[-1]

    return {norm: tuple(names) for norm, names in readers.items() if all(direct(norm, name) for name in names)}
