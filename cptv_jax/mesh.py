"""The only file that mentions devices."""

import time
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp

from cptv_jax.interpreters.arithmetic import ARITHMETICS, Arithmetic, ArithmeticName
from cptv_jax.interpreters.tensor import Tensor


def default_chunk(batch: int) -> tuple[int, int]:
    """Images and candidates to compute at once on the present backend.

    On a CPU small chunks stay in its caches: ten images at a time run 1.6 times as fast as a hundred.
    """
    if jax.default_backend() == "cpu":
        return min(batch, 10), 1
    return batch, 8


@cache
def compiler_options() -> dict[str, Any]:
    """Options of jax.jit for the programs that take the time, on the present backend.

    XLA's CPU compiler vectorizes to 256 bits unless told otherwise.
    """
    return {"xla_cpu_prefer_vector_width": 512} if jax.default_backend() == "cpu" else {}


@cache
def fastest_arithmetic() -> ArithmeticName:
    """The fastest way to multiply codes on the present backend, by a race of one matmul; the result is kept.

    It decides about time alone: every arithmetic gives the same numbers.
    """
    codes = jnp.full((512, 512), 7, jnp.uint8)
    tensor = Tensor(codes, jnp.float32(1), jnp.float32(128))
    seconds: dict[ArithmeticName, float] = {}
    for name in ARITHMETICS:
        run = jax.jit(Arithmetic(name, weight_bits=4).matmul_weight)
        jax.block_until_ready(run(tensor, tensor))
        times = []
        for _ in range(5):
            start = time.perf_counter()
            jax.block_until_ready(run(tensor, tensor))
            times.append(time.perf_counter() - start)
        seconds[name] = min(times)
    return min(seconds, key=lambda name: seconds[name])
