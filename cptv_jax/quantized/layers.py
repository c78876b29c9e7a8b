"""Where a model's nested weights hold the arrays of a layer, and which sites belong to a stage."""

from collections.abc import Iterable, Mapping
from functools import lru_cache
from types import MappingProxyType
from typing import Any

import jax

from cptv_jax.models.architecture import Architecture, sites_of
from cptv_jax.recipe.sites import Site

Path = tuple[str, ...]


@lru_cache(maxsize=16)
def stage_sites(architecture: Architecture) -> Mapping[str, Mapping[str, Site]]:
    """Groups the sites of an architecture by stage.

    Args:
        architecture: The architecture.

    Returns:
        The sites by the stage's name and the site's local name, in the order of the forward pass.
    """
    found: dict[str, dict[str, Site]] = {name: {} for name in architecture.stage_names}
    for site in sites_of(architecture):
        found[site.stage][site.local] = site
    return MappingProxyType(found)


@lru_cache(maxsize=16)
def layers_by_name(architecture: Architecture) -> Mapping[str, tuple[str, Path]]:
    """Finds where each layer's arrays are.

    Args:
        architecture: The architecture.

    Returns:
        The layer's stage and the path of its arrays there, by the layer's name in the model.
    """
    return MappingProxyType({site.layer_name: (site.stage, path_of(site)) for site in sites_of(architecture)})


def path_of(site: Site) -> Path:
    """Returns the path in a stage's weights of the layer that a site belongs to.

    Args:
        site: The site.
    """
    return tuple(site.layer.split("."))


def arrays_at(node: Mapping[str, Any], path: Iterable[str]) -> Mapping[str, Any]:
    """Returns the arrays of the layer at a path of a stage's weights.

    Args:
        node: The stage's weights.
        path: The layer's path.
    """
    for name in path:
        node = node[name]
    return node


def replace_arrays(node: Mapping[str, Any], path: Path, arrays: Mapping[str, jax.Array]) -> dict[str, Any]:
    """Replaces arrays of the layer at a path of a stage's weights.

    Args:
        node: The stage's weights.
        path: The layer's path.
        arrays: The new arrays by name.

    Returns:
        The stage's weights with these arrays.

    Raises:
        KeyError: The layer lacks one of the arrays.
    """
    if not path:
        unknown = set(arrays) - set(node)
        if unknown:
            raise KeyError(f"the layer has no {sorted(unknown)}")
        return {**node, **arrays}
    return {**node, path[0]: replace_arrays(node[path[0]], path[1:], arrays)}
