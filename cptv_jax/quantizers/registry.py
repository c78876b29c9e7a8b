"""Which name stands for which quantizer class in files."""

from dataclasses import is_dataclass
from typing import Any

import jax

from cptv_jax.errors import InputError
from cptv_jax.quantizers.base import Quantizer
from cptv_jax.quantizers.bias_correction import BiasCorrected
from cptv_jax.quantizers.dual_uniform import DualUniform
from cptv_jax.quantizers.focusing import Focusing
from cptv_jax.quantizers.logarithmic import Log2, LogSqrt2
from cptv_jax.quantizers.low_rank import LowRank, RankSearch
from cptv_jax.quantizers.twin import TwinGelu, TwinSoftmax
from cptv_jax.quantizers.uniform import FractionalUniform, OffsetUniform, Uniform
from cptv_jax.registry import Registry

QUANTIZER_CLASSES: Registry[type[Any]] = Registry("quantizer")
_METHODS = ("with_scale", "codes", "values", "steps", "free", "with_free", "with_rounding", "free_units")


def register_quantizer(name: str, cls: type[Any]) -> type[Any]:
    """Makes a quantizer class known under a name, by which saved models find it again.

    Args:
        name: As saved models write it; the library's own are called by their class names ("Uniform"). Recipes use the
            name that is given to `register_fit`.
        cls: A frozen dataclass that JAX knows as a pytree (`jax.tree_util.register_dataclass`), with the methods of
            `Quantizer`. Whoever loads a model with such a quantizer must first import the code that registers it.

    Returns:
        The class.

    Raises:
        InputError: The name or the class is registered already, or the class is not a quantizer.

    Example:
        >>> register_quantizer("Ternary", Ternary)  # see ScaledQuantizer for the class
    """
    missing = [method for method in _METHODS if not callable(getattr(cls, method, None))]
    if missing:
        raise InputError(
            f"quantizer class {cls.__name__} has no {missing[0]}(); derive it from ScaledQuantizer or write it"
        )
    if not is_dataclass(cls) or jax.tree_util.all_leaves([object.__new__(cls)]):
        raise InputError(
            f"quantizer class {cls.__name__} is not a registered dataclass; decorate it with "
            "@jax.tree_util.register_dataclass and @dataclass(frozen=True)"
        )
    known = next((other for other, own in QUANTIZER_CLASSES.items() if own is cls), name)
    if known != name:
        raise InputError(f"quantizer class {cls.__name__} is registered as '{known}' already")
    return QUANTIZER_CLASSES.register(name, cls)


def name_of_quantizer(quantizer: Quantizer) -> str | None:
    """Finds the name under which a quantizer's class is registered.

    Args:
        quantizer: The quantizer.

    Returns:
        The name; None where the class is not registered.
    """
    return next((name for name, cls in QUANTIZER_CLASSES.items() if cls is type(quantizer)), None)


for _cls in (
    Uniform,
    OffsetUniform,
    FractionalUniform,
    DualUniform,
    Log2,
    LogSqrt2,
    Focusing,
    BiasCorrected,
    LowRank,
    RankSearch,
    TwinSoftmax,
    TwinGelu,
):
    register_quantizer(_cls.__name__, _cls)
