"""Which arithmetics the present backend computes exactly, and which of them is fastest."""

import time
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from cptv_jax.errors import InputError
from cptv_jax.interpreters.arithmetic import ARITHMETICS, Arithmetic, ArithmeticName
from cptv_jax.interpreters.tensor import Tensor

_RACE_SIZE, _RACE_ROUNDS = 768, 12


def _make_race_program(name: ArithmeticName) -> Callable[[], PyTree]:
    codes = jnp.full((_RACE_SIZE, _RACE_SIZE), 7, jnp.uint8)
    tensor = Tensor(codes, jnp.float32(1), jnp.float32(128))
    product = jax.jit(Arithmetic(name, weight_bits=4).matmul_weight)
    return lambda: jax.block_until_ready(product(tensor, tensor))


def _multiply(arithmetic: Arithmetic, tokens: Tensor, kernel: Tensor) -> tuple[Any, ...]:
    """Returns products in the forms of a forward pass: of heads cut from one tensor, of tokens with a weight."""
    heads = tokens.move(lambda x: x.reshape(8, 17, 3, 4, 16).transpose(2, 0, 3, 1, 4))
    query, key, value = (heads.move(lambda x, i=i: x[i]) for i in range(3))  # type: ignore[misc]
    scores = arithmetic.matmul(query, key.move(lambda x: x.swapaxes(-1, -2)))
    weights = key.move(lambda x: jnp.concatenate([x, x[..., :1]], -1))  # codes in the shape of the scores
    mixed = arithmetic.matmul(weights, value)
    return scores, mixed, arithmetic.matmul_weight(tokens, kernel), arithmetic.row_sums(tokens)


def _multiply_exactly(tokens: np.ndarray, kernel: np.ndarray) -> tuple[np.ndarray, ...]:
    """Returns the products of `_multiply`, computed in integers."""
    query, key, value = tokens.reshape(8, 17, 3, 4, 16).transpose(2, 0, 3, 1, 4)
    weights = np.concatenate([key, key[..., :1]], -1)
    return query @ key.swapaxes(-1, -2), weights @ value, tokens @ kernel, tokens.sum(-1, keepdims=True)


def supported_arithmetics() -> tuple[ArithmeticName, ...]:
    """Lists the arithmetics that the present backend computes, and computes exactly; measured once per process.

    The CPU backend of older JAX has no product of bfloat16 into float32, and one GPU compiler (jax 0.11.2 without
    autotuning) was seen to give wrong int8 products.

    Returns:
        Their names. The call may stand in a function that JAX traces.
    """
    with jax.ensure_compile_time_eval():  # otherwise a first call under a trace would measure tracers
        return _measure_supported()


@cache
def _measure_supported() -> tuple[ArithmeticName, ...]:
    rng = np.random.default_rng(0)
    codes, weight = (rng.integers(0, 256, shape) for shape in ((8, 17, 192), (192, 64)))
    tokens = Tensor(jnp.asarray(codes, jnp.uint8), jnp.float32(1), jnp.float32(119))
    zeros = rng.integers(100, 156, 64)
    kernel = Tensor(jnp.asarray(weight, jnp.uint8), jnp.ones(64), jnp.asarray(zeros, jnp.float32))
    exact = _multiply_exactly(codes - 119, weight - zeros)
    found = []
    for name in ARITHMETICS:
        with suppress(jax.errors.JaxRuntimeError):
            _make_race_program(name)()
            products = jax.jit(_multiply, static_argnums=0)(Arithmetic(name), tokens, kernel)
            if all(np.array_equal(np.reshape(p, e.shape), e) for p, e in zip(products, exact, strict=True)):
                found.append(name)
    return tuple(found)


def fastest_arithmetic() -> ArithmeticName:
    """Finds the arithmetic that is fastest on the present backend, by a race of one matmul; the result is kept.

    The race decides about time alone: every arithmetic gives the same numbers.

    Returns:
        Its name. The call may stand in a function that JAX traces.
    """
    with jax.ensure_compile_time_eval():
        return _measure_fastest()


@cache
def _measure_fastest() -> ArithmeticName:
    programs = {name: _make_race_program(name) for name in supported_arithmetics()}
    seconds = dict.fromkeys(programs, np.inf)
    for _ in range(_RACE_ROUNDS):  # they take turns and the best time counts, so that other work decides nothing
        for name, run in programs.items():
            start = time.perf_counter()
            run()
            seconds[name] = min(seconds[name], time.perf_counter() - start)
    return min(seconds, key=lambda name: seconds[name])


def gradient_arithmetic(name: ArithmeticName | None = None) -> ArithmeticName:
    """Chooses the arithmetic that gradients are computed with.

    Unlike `fastest_arithmetic` it holds no race: bfloat16 and float32 give different gradients, and a resumed run must
    continue with the same ones.

    Args:
        name: The user's choice, or None.

    Returns:
        `name` if it is given, else "bf16-codes" where the backend computes it, else "float32".
    """
    return name or ("bf16-codes" if "bf16-codes" in supported_arithmetics() else "float32")


def check_arithmetic(name: ArithmeticName) -> None:
    """Checks that the present backend can compute an arithmetic.

    Args:
        name: The arithmetic.

    Raises:
        InputError: If it cannot.
    """
    known = supported_arithmetics()
    if name not in known:
        raise InputError(
            f"arithmetic {name} cannot be computed on this {jax.default_backend()} with jax {jax.__version__}; "
            f"set search.compute.arithmetic to {' or '.join(known)}, or leave it out"
        )
