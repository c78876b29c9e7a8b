"""Checks at run time the annotations that mypy cannot: shapes and dtypes of arrays.

Pytest's option --jaxtyping-packages=cptv_jax,type_checks.check applies it to each function of the package.
"""

import functools
import inspect
import operator
import types
import typing
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from beartype import BeartypeConf, beartype
from jaxtyping import AbstractArray

_check = beartype(conf=BeartypeConf(is_pep484_tower=True))  # an int does for a float


def _names_a_shape(hint: object) -> bool:
    if isinstance(hint, type) and issubclass(hint, AbstractArray):
        return True
    return any(_names_a_shape(part) for part in typing.get_args(hint))


def _of_any_array(hint: Any) -> Any:
    """The hint with all that JAX's functions take where it says Array: of NumPy too, abstract ones, and scalars."""
    if isinstance(hint, type) and issubclass(hint, AbstractArray):
        numpy = np.ndarray | np.generic
        taken = numpy | jax.Array | jax.ShapeDtypeStruct if hint.array_type is jax.Array else numpy
        return hint.dtype[taken, hint.dim_str]
    if not _names_a_shape(hint):
        return hint
    parts = tuple(_of_any_array(part) for part in typing.get_args(hint))
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        return functools.reduce(operator.or_, parts)
    return hint.copy_with(parts) if hasattr(hint, "copy_with") else typing.get_origin(hint)[parts]


def check(function: Callable[..., Any]) -> Callable[..., Any]:
    """Applies beartype, for the annotations with shapes only: it knows neither Self in a method nor our protocols.

    Not to the constructors of pytrees: JAX makes those of whatever it maps over, stacks and placeholders among them.
    """
    hints = {
        name: _of_any_array(hint) for name, hint in inspect.get_annotations(function).items() if _names_a_shape(hint)
    }
    if not hints or function.__name__ == "__init__":
        return function
    function.__annotations__ = hints
    return _check(function)
