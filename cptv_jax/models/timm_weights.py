"""Maps the tensors of a file of weights, with its keys and layout, one to one onto the modules of this library."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from cptv_jax.errors import InputError
from cptv_jax.models.architecture import Architecture, Weights, abstract_weights
from cptv_jax.models.weight_table import Entry


def key_table(architecture: Architecture) -> tuple[Entry, ...]:
    """Builds an architecture's weight table.

    Args:
        architecture: The model's architecture.

    Returns:
        Every tensor of the file once, and each array of the modules exactly once.
    """
    return tuple(architecture.family.weight_table(architecture.config))


def _list(keys: list[str]) -> str:
    return ", ".join(f"'{key}'" for key in keys[:3]) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")


def _list_shapes(weights: Weights) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of arrays by their dotted place."""
    leaves = jax.tree_util.tree_leaves_with_path(weights)
    return {".".join(str(key.key) for key in path): tuple(leaf.shape) for path, leaf in leaves}


def from_timm(tensors: Mapping[str, np.ndarray], architecture: Architecture, source: str) -> Weights:
    """Builds the weights of an architecture from the tensors of a file, by the weight table of its family.

    Args:
        tensors: By the file's key (timm's, for the models of the zoo), in the file's layout (torch shapes), float32.
        architecture: The architecture that the weights are for.
        source: Where they come from, for messages.

    Returns:
        By stage, the arrays of its module, float32.

    Raises:
        InputError: For a missing key, an extra key or a wrong shape, and for a table that does not fit the modules.
    """
    table = key_table(architecture)
    wanted = {entry.key for entry in table}
    missing = [entry.key for entry in table if entry.key not in tensors]
    if missing:
        raise InputError(
            f"{source} lacks {_list(missing)} of {architecture.name}; is it the weights of another model? (see --arch)"
        )
    extra = [key for key in tensors if key not in wanted]
    if extra:
        raise InputError(
            f"{source} has {_list(extra)}, which {architecture.name} does not know; is it another model's? (see --arch)"
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
    wanted_arrays = abstract_weights(architecture)
    given, needed = (_list_shapes(tree) for tree in (weights, wanted_arrays))
    wrong = sorted(place for place in given.keys() | needed.keys() if given.get(place) != needed.get(place))
    if wrong:
        raise InputError(
            f"the weight table of family {architecture.family.name} does not fit its modules at {_list(wrong)}: shape "
            f"{given.get(wrong[0])} of '{wrong[0]}' in the table, {needed.get(wrong[0])} in the module (None: absent); "
            "correct the table"
        )
    return jax.tree.map(lambda abstract, array: array, wanted_arrays, weights)  # in the modules' order


def to_timm(weights: Weights, architecture: Architecture) -> dict[str, np.ndarray]:
    """Converts weights to the tensors of a file; the inverse of `from_timm`.

    Args:
        weights: By stage, the arrays of its module.
        architecture: The architecture that the weights are for.

    Returns:
        By the file's key (timm's), contiguous arrays in its layout (torch shapes).
    """
    tensors = {}
    for entry in key_table(architecture):
        node = weights[entry.stage]
        for name in entry.path:
            node = node[name]
        tensors[entry.key] = np.ascontiguousarray(entry.to_timm(np.asarray(node)))
    return tensors
