"""Sites: the named places where a forward pass can be quantized."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

Role = Literal["weight", "output"]
Kind = Literal[
    "weight", "image", "tensor", "operand", "linear", "hidden", "matmul", "layer_norm", "softmax", "gelu", "add"
]


def full_name(stage: str, local: str) -> str:
    """Joins the name of a stage's site or layer in the model; the only place that makes such names.

    Args:
        stage: The stage's name.
        local: The name of the site or layer within the stage.

    Returns:
        The name in the model ("blocks.3.attn.qkv").
    """
    return f"{stage}.{local}"


def weight_site(layer: str) -> str:
    """Makes the name of the site of a linear layer's weight; the only place that makes such names.

    Args:
        layer: The layer's name, relative to the stage or in the model.

    Returns:
        The site's name, relative to the same.
    """
    return f"{layer}.weight"


@dataclass(frozen=True)
class Site:
    """A named place where a tensor can be quantized.

    Names of sites are keys that are never parsed: the parts of a name are fields here.

    Attributes:
        stage: The stage that it belongs to ("blocks.3").
        layer: The operation that produces it, by its path in the stage ("attn.qkv"); for a weight, its linear layer.
        kind: What produces it. "image" is the model's input; "tensor" a tensor that no operation produces; "hidden" a
            linear layer's output that only a GELU reads; "operand" a piece of a tensor on its way into a matmul.
        shape: The tensor's shape; the leading axis of an activation is the batch.
        reads: For a weight, the site of the tensor that its layer multiplies it by; for a matmul, the sites of both
            operands; for other kinds, nothing.
        source: For an operand, the site that it is a piece of.
    """

    stage: str
    layer: str
    kind: Kind
    shape: tuple[int, ...]
    reads: tuple[str, ...] = ()
    source: str = ""

    @property
    def role(self) -> Role:
        """Whether it is a layer's weight or an operation's output."""
        return "weight" if self.kind == "weight" else "output"

    @property
    def local(self) -> str:
        """Its name within the stage."""
        return weight_site(self.layer) if self.role == "weight" else self.layer

    @property
    def name(self) -> str:
        """Its name in the model."""
        return full_name(self.stage, self.local)

    @property
    def layer_name(self) -> str:
        """The name of its operation in the model ("blocks.3.attn.qkv"), where a layer's arrays are found."""
        return full_name(self.stage, self.layer)


@dataclass(frozen=True)
class Product:
    """A matmul of a forward pass.

    Attributes:
        multiplications: Its multiplications for one image.
        operands: The sites of its operands.
    """

    multiplications: int
    operands: tuple[str, ...]


def list_products(sites: Iterable[Site]) -> tuple[Product, ...]:
    """Lists every linear layer and matmul, as if the head read all tokens of the last block.

    Args:
        sites: Every site of an architecture, in the order of the forward pass.

    Returns:
        The products, in the same order.
    """
    known = {site.name: site for site in sites}
    found = []
    for site in known.values():
        if site.kind == "weight":
            output = known[site.layer_name]
            found.append(Product(math.prod(output.shape[1:]) * site.shape[0], (*site.reads, site.name)))
        elif site.kind == "matmul":
            terms = known[site.reads[0]].shape[-1]
            found.append(Product(math.prod(site.shape[1:]) * terms, site.reads))
    return tuple(found)


def keeps_channels(site: Site, sites: Iterable[Site]) -> bool:
    """Decides whether a scale for each channel of a tensor can be applied where the tensor is read.

    It cannot where the channels are cut into heads or patches, nor where a matmul of activations sums over them.

    Args:
        site: The tensor's site.
        sites: Every site of the architecture.

    Returns:
        True if every reader sees the tensor's channels.
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
    """Finds the linear layers that read each LayerNorm inside the network.

    LayerNorms of the last stage, which the head reads, are left out, and so is a LayerNorm whose channels one of its
    readers does not see unchanged.

    Args:
        sites: Every site of the architecture, in the order of the forward pass.

    Returns:
        By site of a LayerNorm, the weight sites of the layers that read it.
    """
    known = {site.name: site for site in sites}
    last = list(known.values())[-1].stage if known else ""
    norms = {name for name, site in known.items() if site.kind == "layer_norm" and site.stage != last}
    readers: dict[str, list[str]] = {}
    for site in known.values():
        for name in norms.intersection(site.reads):
            readers.setdefault(name, []).append(site.name)

    def direct(norm: str, reader: str) -> bool:
        return known[reader].kind == "weight" and known[reader].shape[0] == known[norm].shape[-1]

    return {norm: tuple(names) for norm, names in readers.items() if all(direct(norm, name) for name in names)}
