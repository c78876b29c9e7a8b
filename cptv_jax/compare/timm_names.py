"""Names in the references that quantize timm's own modules: PTQ4ViT, RepQ-ViT, ERQ."""

from dataclasses import dataclass
from typing import Literal

from cptv_jax.models.architecture import Architecture
from cptv_jax.models.timm_weights import key_table
from cptv_jax.recipe.sites import full_name, weight_site


@dataclass(frozen=True)
class Operand:
    """One quantized operand of a module.

    Attributes:
        module: timm's name, or `blocks.0.attn.matmul1` (query with key) and `.matmul2` (softmax with value).
        role: "weight" or "input" of a linear layer or convolution, "A" or "B" of a matmul.
    """

    module: str
    role: Literal["weight", "input", "A", "B"]


# By site of a block, the module that reads the tensor.
_READ_IN_BLOCK = {
    "norm1": Operand("attn.qkv", "input"),
    "attn.query": Operand("attn.matmul1", "A"),
    "attn.key": Operand("attn.matmul1", "B"),
    "attn.softmax": Operand("attn.matmul2", "A"),
    "attn.value": Operand("attn.matmul2", "B"),
    "attn.context": Operand("attn.proj", "input"),
    "norm2": Operand("mlp.fc1", "input"),
    "mlp.gelu": Operand("mlp.fc2", "input"),
}


def operands_by_site(architecture: Architecture) -> dict[str, Operand]:
    """Maps every site of a ViT that a matmul-only recipe can quantize to the reference's operand.

    Args:
        architecture: The model's architecture.

    Returns:
        By site, the operand.
    """
    found = {"embed.input": Operand("patch_embed.proj", "input"), "head.norm": Operand("head", "input")}
    for i in range(architecture.config.depth):
        for site, operand in _READ_IN_BLOCK.items():
            found[f"blocks.{i}.{site}"] = Operand(f"blocks.{i}.{operand.module}", operand.role)
    for entry in key_table(architecture):
        if entry.path[-1] == "kernel":
            layer = full_name(entry.stage, ".".join(entry.path[:-1]))
            found[weight_site(layer)] = Operand(entry.key.removesuffix(".weight"), "weight")
    return found


def modules_by_layer(architecture: Architecture) -> dict[str, str]:
    """Maps every linear layer and LayerNorm to timm's module.

    Args:
        architecture: The model's architecture.

    Returns:
        By our layer (the name that `Model.layer` takes), the module's name.
    """
    table = key_table(architecture)
    return {full_name(entry.stage, ".".join(entry.path[:-1])): entry.key.rpartition(".")[0] for entry in table}
