"""Where a stage's nested weights have the arrays of a layer."""

from collections.abc import Iterable, Mapping
from typing import Any

import jax

_WEIGHT = ".weight"


def _path_of(site: str) -> list[str]:
    """Where a stage has the layer of a weight site."""
    return site.removesuffix(_WEIGHT).split(".")


def _at(node: Mapping[str, Any], path: Iterable[str]) -> Mapping[str, Any]:
    for name in path:
        node = node[name]
    return node


def _replaced(node: Mapping[str, Any], path: list[str], arrays: Mapping[str, jax.Array]) -> dict[str, Any]:
    if not path:
        unknown = set(arrays) - set(node)
        if unknown:
            raise KeyError(f"the layer has no {sorted(unknown)}")
        return {**node, **arrays}
    return {**node, path[0]: _replaced(node[path[0]], path[1:], arrays)}
