"""What arithmetic costs: the multiplications in a ViT's matmuls, and the fastest matmul of the present machine."""

import time

import jax
import jax.numpy as jnp

from cptv_jax.models.vit import ViTConfig
from cptv_jax.runtime.mesh import DATA, compiler_options, make_mesh, place

# Operand and result types that an arithmetic's matmuls have; its fraction of the peak is measured against them.
OPERANDS = {"float32": jnp.float32, "bf16-codes": jnp.bfloat16, "int8": jnp.int8}
RESULTS = {"float32": jnp.float32, "bf16-codes": jnp.float32, "int8": jnp.int32}


def matmul_flops(config: ViTConfig) -> dict[str, int]:
    """Floating-point operations (two for each multiply-add) in the matmuls of each stage, for one image.

    Of the last block's output the head reads one token (two with distillation), so there only keys and values are
    counted for all tokens.
    """
    tokens, width, read = config.num_tokens, config.width, 2 if config.distilled else 1
    after_keys = 2 * width * width + 2 * width * config.hidden + 2 * tokens * width  # a token's other matmuls
    blocks = [
        2 * tokens * 2 * width * width + 2 * reading * after_keys for reading in [tokens] * (config.depth - 1) + [read]
    ]
    patch = config.patch_size**2 * config.in_channels
    return {
        "embed": 2 * config.num_patches * patch * width,
        **{f"blocks.{i}": flops for i, flops in enumerate(blocks)},
        "head": 2 * read * width * config.num_classes,
    }


def matmul_peak(arithmetic: str, sizes: tuple[int, ...] = (1024, 2048, 4096), repeats: int = 3) -> float:
    """GFLOP/s of the fastest square matmul of an arithmetic's operands.

    Each size is run `repeats` times, on one device and with its rows divided among all of them.
    """
    operands, results = OPERANDS[arithmetic], RESULTS[arithmetic]
    multiply = jax.jit(
        lambda a, b: jnp.matmul(a, b, preferred_element_type=results), compiler_options=compiler_options()
    )
    mesh = make_mesh()
    best = 0.0
    for size in sizes:
        b = jax.random.randint(jax.random.key(0), (size, size), -7, 8).astype(operands)
        for left, right in ((b, b), (place(mesh, b, DATA), place(mesh, b))):
            jax.block_until_ready(multiply(left, right))
            for _ in range(repeats):
                start = time.perf_counter()
                jax.block_until_ready(multiply(left, right))
                best = max(best, 2e-9 * size**3 / (time.perf_counter() - start))
    return round(best, 1)
