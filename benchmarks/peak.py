"""What arithmetic costs: the multiplications in a ViT's matmuls, and the fastest matmul of the present machine."""

import time

import jax
import jax.numpy as jnp

from cptv_jax.models.vit import ViTConfig

# Operand and result types that an arithmetic's matmuls have; its fraction of the peak is measured against them.
OPERANDS = {"float32": jnp.float32, "bf16-codes": jnp.bfloat16, "int8": jnp.int8}
RESULTS = {"float32": jnp.float32, "bf16-codes": jnp.float32, "int8": jnp.int32}


def matmul_flops(config: ViTConfig) -> dict[str, int]:
    """Floating-point operations (two for each multiply-add) in the matmuls of each stage, for one image."""
    tokens, width = config.num_tokens, config.width
    linear = 4 * width * width + 2 * width * config.hidden
    attention = 2 * tokens * width  # scores and context, for each token
    block = 2 * tokens * (linear + attention)
    patch = config.patch_size**2 * config.in_channels
    heads = 2 if config.distilled else 1
    return {
        "embed": 2 * config.num_patches * patch * width,
        **{f"blocks.{i}": block for i in range(config.depth)},
        "head": 2 * heads * width * config.num_classes,
    }


def matmul_peak(arithmetic: str, sizes: tuple[int, ...] = (1024, 2048, 4096), repeats: int = 3) -> float:
    """GFLOP/s of the fastest square matmul of an arithmetic's operands, each size run `repeats` times."""
    operands, results = OPERANDS[arithmetic], RESULTS[arithmetic]
    multiply = jax.jit(lambda a, b: jnp.matmul(a, b, preferred_element_type=results))
    best = 0.0
    for size in sizes:
        a = jax.random.randint(jax.random.key(0), (size, size), -7, 8).astype(operands)
        jax.block_until_ready(multiply(a, a))
        for _ in range(repeats):
            start = time.perf_counter()
            jax.block_until_ready(multiply(a, a))
            best = max(best, 2e-9 * size**3 / (time.perf_counter() - start))
    return round(best, 1)
