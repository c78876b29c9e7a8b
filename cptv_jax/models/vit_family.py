"""The family of Vision Transformers: ViT and DeiT, with timm's names for their weights."""

from cptv_jax.models.family import Family, register_family
from cptv_jax.models.vit import VisionTransformer, ViTConfig
from cptv_jax.models.weight_table import Entry, layer_norm_entries, linear_entries


def vit_weight_table(config: ViTConfig) -> list[Entry]:
    """Lists every tensor of timm's ViT or DeiT of these sizes.

    Args:
        config: The sizes.

    Returns:
        The entries, in timm's order.
    """
    width, hidden, side, channels = config.width, config.hidden, config.patch_size, config.in_channels
    tokens = ["cls_token", "dist_token"] if config.distilled else ["cls_token"]
    entries = [Entry(token, "embed", (token,), (1, 1, width)) for token in tokens]
    entries.append(Entry("pos_embed", "embed", ("pos_embed",), (1, config.num_tokens, width)))
    # A convolution [outputs, channel, row, column] is a linear layer on patches in the order (row, column, channel).
    entries.append(
        Entry(
            "patch_embed.proj.weight",
            "embed",
            ("proj", "kernel"),
            (width, channels, side, side),
            lambda a: a.transpose(2, 3, 1, 0).reshape(-1, width),
            lambda a: a.reshape(side, side, channels, width).transpose(3, 2, 0, 1),
        )
    )
    entries.append(Entry("patch_embed.proj.bias", "embed", ("proj", "bias"), (width,)))
    for i in range(config.depth):
        stage = f"blocks.{i}"
        entries += layer_norm_entries(f"{stage}.norm1", stage, ("norm1",), width)
        entries += linear_entries(f"{stage}.attn.qkv", stage, ("attn", "qkv"), width, 3 * width, config.qkv_bias)
        entries += linear_entries(f"{stage}.attn.proj", stage, ("attn", "proj"), width, width)
        entries += layer_norm_entries(f"{stage}.norm2", stage, ("norm2",), width)
        entries += linear_entries(f"{stage}.mlp.fc1", stage, ("mlp", "fc1"), width, hidden)
        entries += linear_entries(f"{stage}.mlp.fc2", stage, ("mlp", "fc2"), hidden, width)
    entries += layer_norm_entries("norm", "head", ("norm",), width)
    entries += linear_entries("head", "head", ("fc",), width, config.num_classes)
    if config.distilled:
        entries += linear_entries("head_dist", "head", ("fc_dist",), width, config.num_classes)
    return entries


VIT = register_family(
    Family(
        "vit",
        ViTConfig,
        VisionTransformer,
        vit_weight_table,
        searched_sites=("blocks.*.attn.qkv.weight", "blocks.*.attn.proj.weight"),
        image_site="embed.input",
    )
)
