"""Vision Transformer and DeiT, written once against an interpreter's operations, as Flax NNX modules.

Every module is called as module(operations, x). The stages are Embed, then a Block for each layer, then Head. The site
of a linear layer or LayerNorm is its path in the stage, so that a site finds its weights.
"""

from dataclasses import dataclass

import jax.numpy as jnp
from flax import nnx

from cptv_jax.interpreters import Operations, Tensor
from cptv_jax.models.layers import LayerNorm, Linear
from cptv_jax.runtime.stages import Output


@dataclass(frozen=True)
class ViTConfig:
    """Sizes of a ViT (Dosovitskiy et al. 2021) or DeiT (Touvron et al. 2021).

    Attributes:
        image_size: Side of the square image, in pixels.
        patch_size: Side of a square patch, in pixels.
        in_channels: Channels of the image.
        num_classes: Classes that the head tells apart.
        width: Embedding size.
        depth: Number of blocks.
        heads: Attention heads per block.
        mlp_ratio: Width of the hidden MLP layer, relative to width.
        qkv_bias: Whether the layer of query, key and value has a bias.
        layer_norm_epsilon: Added to the variance in every LayerNorm.
        distilled: Whether there are DeiT's distillation token and second head, whose logits are averaged with the
            first's.
    """

    image_size: int = 224
    patch_size: int = 16
    in_channels: int = 3
    num_classes: int = 1000
    width: int = 192
    depth: int = 12
    heads: int = 3
    mlp_ratio: float = 4.0
    qkv_bias: bool = True
    layer_norm_epsilon: float = 1e-6
    distilled: bool = False

    @property
    def num_patches(self) -> int:
        """The number of patches of an image."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def num_prefix_tokens(self) -> int:
        """The number of tokens before the patches: the class token, and DeiT's distillation token."""
        return 2 if self.distilled else 1

    @property
    def num_tokens(self) -> int:
        """The number of tokens of an image."""
        return self.num_patches + self.num_prefix_tokens

    @property
    def hidden(self) -> int:
        """The width of the hidden MLP layer."""
        return int(self.width * self.mlp_ratio)


class Embed(nnx.Module):
    """Turns images [batch, height, width, channels] into tokens [batch, tokens, width].

    Args:
        config: The model's sizes.
        rngs: Random numbers for the weights.
    """

    def __init__(self, config: ViTConfig, *, rngs: nnx.Rngs) -> None:
        self.config = config
        normal = nnx.initializers.truncated_normal(0.02)
        self.proj = Linear(config.patch_size**2 * config.in_channels, config.width, rngs=rngs)
        self.cls_token = nnx.Param(normal(rngs.params(), (1, 1, config.width)))
        self.dist_token = nnx.Param(normal(rngs.params(), (1, 1, config.width))) if config.distilled else None
        self.pos_embed = nnx.Param(normal(rngs.params(), (1, config.num_tokens, config.width)))

    def __call__(self, ops: Operations, images: Tensor) -> Tensor:
        """Cuts images into patches and embeds them.

        Args:
            ops: The interpreter.
            images: [batch, height, width, channels].

        Returns:
            Tokens [batch, tokens, width].
        """
        x = ops.tensor("input", images)
        batch, height, width, channels = x.shape
        side = self.config.patch_size
        grid = (height // side, width // side)
        x = x.move(lambda a: a.reshape(batch, grid[0], side, grid[1], side, channels).swapaxes(2, 3))
        # From here the last axis is the patch, in the order (row, column, channel).
        x = self.proj(ops, "proj", x.move(lambda a: a.reshape(batch, grid[0] * grid[1], -1)))
        prefix = [token[...] for token in (self.cls_token, self.dist_token) if token is not None]
        prefix = [jnp.broadcast_to(token, (batch, *token.shape[1:])) for token in prefix]
        x = ops.tensor("tokens", Tensor(jnp.concatenate([*prefix, x.values], 1)))
        return ops.add("sum", x, ops.tensor("pos_embed", Tensor(self.pos_embed[...])))


class Attention(nnx.Module):
    """Multi-head self-attention.

    Args:
        config: The model's sizes.
        read: How many tokens are computed, from the first; None means all.
        rngs: Random numbers for the weights.
    """

    def __init__(self, config: ViTConfig, *, read: int | None = None, rngs: nnx.Rngs) -> None:
        self.heads = config.heads
        self.read = read
        self.qkv = Linear(config.width, 3 * config.width, bias=config.qkv_bias, rngs=rngs)
        self.proj = Linear(config.width, config.width, rngs=rngs)

    def __call__(self, ops: Operations, site: str, x: Tensor) -> Tensor:
        """Runs the layer.

        Args:
            ops: The interpreter.
            site: The layer's path in its stage.
            x: Tokens [batch, tokens, width].

        Returns:
            Tokens [batch, read, width].
        """
        batch, tokens, width = x.shape
        head = width // self.heads
        qkv = self.qkv(ops, f"{site}.qkv", x)
        # [batch, tokens, 3 * width] -> three of [batch, heads, tokens, head]
        qkv = qkv.move(lambda a: a.reshape(batch, tokens, 3, self.heads, head).transpose(2, 0, 3, 1, 4))
        query, key, value = (
            ops.operand(f"{site}.{name}", qkv.move(lambda a, i=i: a[i]))  # type: ignore[misc]
            for i, name in enumerate(("query", "key", "value"))
        )
        query = ops.first(query, self.read, axis=-2)
        scores = ops.matmul(f"{site}.scores", query, key.move(lambda a: a.swapaxes(-1, -2)), head**-0.5)
        context = ops.matmul(f"{site}.context", ops.softmax(f"{site}.softmax", scores), value)
        return self.proj(ops, f"{site}.proj", context.move(lambda a: a.swapaxes(1, 2).reshape(batch, -1, width)))


class Mlp(nnx.Module):
    """Two linear layers around a GELU.

    Args:
        config: The model's sizes.
        rngs: Random numbers for the weights.
    """

    def __init__(self, config: ViTConfig, *, rngs: nnx.Rngs) -> None:
        self.fc1 = Linear(config.width, config.hidden, rngs=rngs)
        self.fc2 = Linear(config.hidden, config.width, rngs=rngs)

    def __call__(self, ops: Operations, site: str, x: Tensor) -> Tensor:
        """Runs the layers.

        Args:
            ops: The interpreter.
            site: The module's path in its stage.
            x: Tokens [batch, tokens, width].

        Returns:
            A tensor of x's shape.
        """
        hidden = ops.gelu(f"{site}.gelu", self.fc1(ops, f"{site}.fc1", x, hidden=True))
        return self.fc2(ops, f"{site}.fc2", hidden)


class Block(nnx.Module):
    """Pre-norm transformer block.

    Args:
        config: The model's sizes.
        read: How many tokens, from the first, later stages read; None means all.
        rngs: Random numbers for the weights.
    """

    def __init__(self, config: ViTConfig, *, read: int | None = None, rngs: nnx.Rngs) -> None:
        self.read = read
        self.norm1 = LayerNorm(config.width, config.layer_norm_epsilon)
        self.attn = Attention(config, read=read, rngs=rngs)
        self.norm2 = LayerNorm(config.width, config.layer_norm_epsilon)
        self.mlp = Mlp(config, rngs=rngs)

    def __call__(self, ops: Operations, x: Tensor) -> Tensor:
        """Runs the block.

        Args:
            ops: The interpreter.
            x: Tokens [batch, tokens, width].

        Returns:
            Tokens [batch, read, width].
        """
        attended = self.attn(ops, "attn", self.norm1(ops, "norm1", x))
        x = ops.add("residual1", ops.first(x, self.read, axis=1), attended)
        return ops.add("residual2", x, self.mlp(ops, "mlp", self.norm2(ops, "norm2", x)))


class Head(nnx.Module):
    """Turns the class token (and DeiT's distillation token) into class logits.

    Args:
        config: The model's sizes.
        rngs: Random numbers for the weights.
    """

    def __init__(self, config: ViTConfig, *, rngs: nnx.Rngs) -> None:
        self.prefix = config.num_prefix_tokens
        self.norm = LayerNorm(config.width, config.layer_norm_epsilon)
        self.fc = Linear(config.width, config.num_classes, rngs=rngs)
        self.fc_dist = Linear(config.width, config.num_classes, rngs=rngs) if config.distilled else None

    def __call__(self, ops: Operations, x: Tensor) -> Output:
        """Runs the head.

        Args:
            ops: The interpreter.
            x: Tokens [batch, tokens, width].

        Returns:
            Features [batch, prefix tokens * width] and logits [batch, classes].
        """
        tokens = self.norm(ops, "norm", x.move(lambda a: a[:, : self.prefix]))
        logits = self.fc(ops, "fc", tokens.move(lambda a: a[:, 0])).values
        if self.fc_dist is not None:
            logits = (logits + self.fc_dist(ops, "fc_dist", tokens.move(lambda a: a[:, 1])).values) / 2
        return Output(features=tokens.values.reshape(logits.shape[0], -1), logits=logits)


class VisionTransformer(nnx.Module):
    """A whole ViT; `stages` lists its parts in order.

    Args:
        config: The model's sizes.
        rngs: Random numbers for the weights.
    """

    def __init__(self, config: ViTConfig, *, rngs: nnx.Rngs) -> None:
        self.config = config
        self.embed = Embed(config, rngs=rngs)
        for i in range(config.depth):
            # The head reads only the class token (and the distillation token).
            read = config.num_prefix_tokens if i == config.depth - 1 else None
            setattr(self, f"block{i}", Block(config, read=read, rngs=rngs))
        self.head = Head(config, rngs=rngs)

    def stages(self) -> dict[str, nnx.Module]:
        """Lists the stages by name, in the order they run.

        Returns:
            The stages: "embed", "blocks.0" and so on, "head".
        """
        blocks = {f"blocks.{i}": getattr(self, f"block{i}") for i in range(self.config.depth)}
        return {"embed": self.embed, **blocks, "head": self.head}

    def __call__(self, ops: Operations, images: Tensor) -> Output:
        """Runs every stage.

        Args:
            ops: The interpreter.
            images: [batch, height, width, channels].

        Returns:
            The output of the head.
        """
        x: Tensor | Output = images
        for stage in self.stages().values():
            x = stage(ops, x)
        assert isinstance(x, Output)
        return x
