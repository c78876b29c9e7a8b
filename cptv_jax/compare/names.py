"""Names: our sites and the module names that FQ-ViT and Evol-Q give to the same tensors."""

_AROUND_BLOCKS = {
    "embed.input": "qact_input",
    "embed.proj.weight": "patch_embed.proj",
    "embed.proj": "patch_embed.qact",
    "embed.tokens": "qact_embed",
    "embed.pos_embed": "qact_pos",
    "embed.sum": "qact1",
    "head.norm": "qact2",
    "head.fc.weight": "head",
    "head.fc": "act_out",
}
# Their quantizer follows the operation whose output it rounds: a block's qact1 is our norm1.
_IN_BLOCK = {
    "norm1": "qact1",
    "attn.qkv.weight": "attn.qkv",
    "attn.qkv": "attn.qact1",
    "attn.scores": "attn.qact_attn1",
    "attn.softmax": "attn.log_int_softmax",
    "attn.context": "attn.qact2",
    "attn.proj.weight": "attn.proj",
    "attn.proj": "attn.qact3",
    "residual1": "qact2",
    "norm2": "qact3",
    "mlp.fc1.weight": "mlp.fc1",
    "mlp.gelu": "mlp.qact1",
    "mlp.fc2.weight": "mlp.fc2",
    "mlp.fc2": "mlp.qact2",
    "residual2": "qact4",
}


def modules_by_site(depth: int) -> dict[str, str]:
    """Maps every site of a ViT to the reference's module, weights and activations alike.

    Args:
        depth: The number of blocks.

    Returns:
        By site, the module's name.
    """
    blocks = {f"blocks.{i}.{site}": f"blocks.{i}.{module}" for i in range(depth) for site, module in _IN_BLOCK.items()}
    return {**_AROUND_BLOCKS, **blocks}


def sites_by_module(depth: int) -> dict[str, str]:
    """Maps the reference's modules to our sites; the inverse of `modules_by_site`.

    Args:
        depth: The number of blocks.

    Returns:
        By module, the site's name.
    """
    return {module: site for site, module in modules_by_site(depth).items()}


def output_site(stage: str) -> str:
    """Names the site through which the tokens leave a stage: embed and the blocks.

    Args:
        stage: The stage's name.

    Returns:
        The site's name relative to the stage.
    """
    return "sum" if stage == "embed" else "residual2"
