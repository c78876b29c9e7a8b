"""timm's weight keys and shapes, mapped one to one onto the modules of this library."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cptv_jax.errors import InputError
from cptv_jax.models.architecture import Architecture, Weights, abstract_weights
from cptv_jax.models.vit import ViTConfig

Transform = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Entry:
    """One timm tensor: its key, the stage and attribute path it becomes, and the change of layout both ways."""

    key: str
    stage: str
    path: tuple[str, ...]
    shape: tuple[int, ...]
    to_module: Transform
    to_timm: Transform


def _same(a: np.ndarray) -> np.ndarray:
    return a


def _transposed(a: np.ndarray) -> np.ndarray:
    return a.T


def _vit_table(config: ViTConfig) -> list[Entry]:
    width, hidden, side, channels = config.width, config.hidden, config.patch_size, config.in_channels
    entries: list[Entry] = []

    def vector(key: str, stage: str, *path: str, shape: tuple[int, ...]) -> None:
        entries.append(Entry(key, stage, path, shape, _same, _same))

    def linear(key: str, stage: str, *path: str, inputs: int, outputs: int, bias: bool = True) -> None:
        kernel = Entry(f"{key}.weight", stage, (*path, "kernel"), (outputs, inputs), _transposed, _transposed)
        entries.append(kernel)
        if bias:
            vector(f"{key}.bias", stage, *path, "bias", shape=(outputs,))

    def layer_norm(key: str, stage: str, *path: str) -> None:
        for name in ("weight", "bias"):
            vector(f"{key}.{name}", stage, *path, name, shape=(width,))

    vector("cls_token", "embed", "cls_token", shape=(1, 1, width))
    if config.distilled:
        vector("dist_token", "embed", "dist_token", shape=(1, 1, width))
    vector("pos_embed", "embed", "pos_embed", shape=(1, config.num_tokens, width))
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
    vector("patch_embed.proj.bias", "embed", "proj", "bias", shape=(width,))
    for i in range(config.depth):
        stage = f"blocks.{i}"
        layer_norm(f"{stage}.norm1", stage, "norm1")
        linear(f"{stage}.attn.qkv", stage, "attn", "qkv", inputs=width, outputs=3 * width, bias=config.qkv_bias)
        linear(f"{stage}.attn.proj", stage, "attn", "proj", inputs=width, outputs=width)
        layer_norm(f"{stage}.norm2", stage, "norm2")
        linear(f"{stage}.mlp.fc1", stage, "mlp", "fc1", inputs=width, outputs=hidden)
        linear(f"{stage}.mlp.fc2", stage, "mlp", "fc2", inputs=hidden, outputs=width)
    layer_norm("norm", "head", "norm")
    linear("head", "head", "fc", inputs=width, outputs=config.num_classes)
    if config.distilled:
        linear("head_dist", "head", "fc_dist", inputs=width, outputs=config.num_classes)
    return entries


TABLES: dict[str, Callable[[Any], list[Entry]]] = {"vit": _vit_table}


def key_table(architecture: Architecture) -> tuple[Entry, ...]:
    """Every tensor of the architecture, once; the table covers each module parameter exactly once."""
    return tuple(TABLES[architecture.family](architecture.config))


def _some(keys: list[str]) -> str:
    return ", ".join(f"'{key}'" for key in keys[:3]) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")


def from_timm(tensors: Mapping[str, np.ndarray], architecture: Architecture, source: str) -> Weights:
    """Weights of an architecture from timm's tensors (torch shapes, float32).

    source: where they come from, for messages. Raises InputError for a missing key, an extra key or a wrong shape.
    """
    table = key_table(architecture)
    wanted = {entry.key for entry in table}
    missing = [entry.key for entry in table if entry.key not in tensors]
    if missing:
        raise InputError(
            f"{source} lacks {_some(missing)} of {architecture.name}; is it the weights of another model? (see --arch)"
        )
    extra = [key for key in tensors if key not in wanted]
    if extra:
        raise InputError(
            f"{source} has {_some(extra)}, which {architecture.name} does not know; is it another model's? (see --arch)"
        )
    weights: Weights = {}
    for entry in table:
        tensor = tensors[entry.key]
        if tensor.shape != entry.shape:
            raise InputError(
                f"{source}: '{entry.key}' has shape {tensor.shape}, but {architecture.name} needs {entry.shape}; "
                "is it another model's? (see --arch)"
            )
        node = weights.setdefault(entry.stage, {})
        for name in entry.path[:-1]:
            node = node.setdefault(name, {})
        node[entry.path[-1]] = jnp.asarray(entry.to_module(np.asarray(tensor, np.float32)))
    # Order and presence as the modules have them: this also proves that the table is complete.
    return jax.tree.map(lambda abstract, array: array, abstract_weights(architecture), weights)


def to_timm(weights: Weights, architecture: Architecture) -> dict[str, np.ndarray]:
    """The inverse of `from_timm`: tensors under timm's keys in torch shapes."""
    tensors = {}
    for entry in key_table(architecture):
        node = weights[entry.stage]
        for name in entry.path:
            node = node[name]
        tensors[entry.key] = np.ascontiguousarray(entry.to_timm(np.asarray(node)))
    return tensors
