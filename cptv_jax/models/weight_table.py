"""Weight tables: they say which tensor of a file becomes which array of a model."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

Transform = Callable[[np.ndarray], np.ndarray]


def _keep(a: np.ndarray) -> np.ndarray:
    return a


def _transpose(a: np.ndarray) -> np.ndarray:
    return a.T


@dataclass(frozen=True)
class Entry:
    """One tensor of a file of weights, and the array of a model that it becomes.

    Attributes:
        key: Its key in the file.
        stage: The stage that the array belongs to ("blocks.3").
        path: The attributes that lead to the array within the stage's module ("attn", "qkv", "kernel").
        shape: Its shape in the file.
        to_module: Converts from the file's layout to the module's.
        to_timm: Converts from the module's layout to the file's.
    """

    key: str
    stage: str
    path: tuple[str, ...]
    shape: tuple[int, ...]
    to_module: Transform = _keep
    to_timm: Transform = _keep


def linear_entries(
    key: str, stage: str, path: Sequence[str], inputs: int, outputs: int, bias: bool = True
) -> list[Entry]:
    """Lists the entries of a linear layer, which torch keeps as `weight` [outputs, inputs] and `bias` [outputs].

    Args:
        key: The layer's key in the file, without ".weight" and ".bias".
        stage: The stage that the layer belongs to.
        path: The attributes that lead to the layer (`cptv_jax.models.layers.Linear`) within the stage's module.
        inputs: Channels that it reads.
        outputs: Channels that it produces.
        bias: Whether it has a bias.

    Returns:
        An entry for the kernel and, if there is a bias, one for the bias.
    """
    kernel = Entry(f"{key}.weight", stage, (*path, "kernel"), (outputs, inputs), _transpose, _transpose)
    return [kernel, Entry(f"{key}.bias", stage, (*path, "bias"), (outputs,))] if bias else [kernel]


def layer_norm_entries(key: str, stage: str, path: Sequence[str], width: int) -> list[Entry]:
    """Lists the entries of a LayerNorm, which torch keeps as `weight` [width] and `bias` [width].

    Args:
        key: The LayerNorm's key in the file, without ".weight" and ".bias".
        stage: The stage that it belongs to.
        path: The attributes that lead to it (`cptv_jax.models.layers.LayerNorm`) within the stage's module.
        width: Channels that it normalizes over.

    Returns:
        An entry for the weight and one for the bias.
    """
    return [Entry(f"{key}.{name}", stage, (*path, name), (width,)) for name in ("weight", "bias")]
