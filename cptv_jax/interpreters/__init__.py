"""Interpreters: the meanings that the operations of a forward pass can have."""

from cptv_jax.interpreters.arithmetic import ARITHMETICS, Arithmetic, ArithmeticName
from cptv_jax.interpreters.capturing import Capturing
from cptv_jax.interpreters.differentiable import StraightThrough
from cptv_jax.interpreters.fake_quant import FakeQuant, Float, Weight, effective_weight, quantize_weight
from cptv_jax.interpreters.initializing import Initializing
from cptv_jax.interpreters.listing import list_sites
from cptv_jax.interpreters.observing import Observing
from cptv_jax.interpreters.operations import Operations
from cptv_jax.interpreters.tensor import Tensor

__all__ = [
    "ARITHMETICS",
    "Arithmetic",
    "ArithmeticName",
    "Capturing",
    "FakeQuant",
    "Float",
    "Initializing",
    "Observing",
    "Operations",
    "StraightThrough",
    "Tensor",
    "Weight",
    "effective_weight",
    "list_sites",
    "quantize_weight",
]
