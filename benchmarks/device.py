"""The evaluator on an accelerator: exactness, share of the matmul peak, and the published search schedule end to end.

    python benchmarks/device.py [--architecture deit_base_patch16_224] [--images 1000] [--passes 10] [--profile]

Weights, images and the teacher's outputs are random (time does not depend on them), W4A8, Evol-Q's recipe; ranges from
16 of the images.
"""

import argparse
import glob
import json
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cptv_jax.interpreters import ARITHMETICS, Arithmetic, Tensor
from cptv_jax.methods.registry import METHODS
from cptv_jax.models.architecture import sites_of
from cptv_jax.models.zoo import architecture_named
from cptv_jax.quantized.candidate import Space
from cptv_jax.quantized.execution import Simulated
from cptv_jax.quantized.model import Model, QuantizedModel
from cptv_jax.recipe.resolve import RecipeConfig, resolve
from cptv_jax.runtime.arithmetics import fastest_arithmetic
from cptv_jax.runtime.forward import activation_bytes, compute_outputs
from cptv_jax.runtime.mesh import make_mesh, pieces_at_once
from cptv_jax.runtime.stages import Output
from cptv_jax.search import Evaluator, EvolQ, Objective
from cptv_jax.search.loop import Search, run_search
from cptv_jax.search.state import SearchState, initial_state

SITES = ("attn.qkv.weight", "attn.proj.weight")


def seconds(run: Callable[[], Any], repeats: int = 5) -> float:
    """Median seconds of a call, after one to warm up."""
    jax.block_until_ready(run())
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(run())
        times.append(time.perf_counter() - start)
    return float(np.median(times))


def matmul_peaks(size: int) -> dict[str, float]:
    """Operations a second of one square matmul of random operands, by type."""
    peaks = {}
    for name, dtype, out in (("bf16", jnp.bfloat16, jnp.float32), ("int8", jnp.int8, jnp.int32)):
        a, b = (jax.random.randint(jax.random.key(i), (size, size), -100, 100).astype(dtype) for i in (0, 1))
        product = jax.jit(partial(jnp.matmul, preferred_element_type=out))
        peaks[name] = 2 * size**3 / seconds(partial(product, a, b))
    return peaks


def inexact(rng: Any, inputs: int, bits: int) -> dict[str, int]:
    """How many products of random codes differ from integer arithmetic, by arithmetic."""
    x, w = (rng.integers(0, 2**b, shape) for b, shape in ((8, (512, inputs)), (bits, (inputs, 256))))
    codes = [
        Tensor(jnp.asarray(c, jnp.uint8), jnp.float32(1), jnp.float32(z)) for c, z in ((x, 119), (w, 2**bits // 2))
    ]
    exact = (x - 119) @ (w - 2**bits // 2)
    return {
        name: int((np.asarray(jax.jit(Arithmetic(name, weight_bits=bits).matmul_weight)(*codes)) != exact).sum())
        for name in ARITHMETICS
    }


def operations(architecture: Any, block: int) -> float:
    """Multiplications and additions that an image takes from block `block` to the head, matmuls alone."""
    config = architecture.config
    tokens, width, hidden = config.num_tokens, config.width, config.hidden
    whole = tokens * width * (4 * width + 2 * hidden) + 2 * tokens**2 * width
    # Of the last block the head reads one token: queries for all of them, the rest for one.
    last = tokens * 3 * width**2 + width**2 + 2 * width * hidden + 2 * tokens * width
    return 2.0 * ((config.depth - 1 - block) * whole + last + width * config.num_classes)


def quantized_model(architecture: Any, images: np.ndarray) -> QuantizedModel:
    model = Model(architecture, architecture.initialize(0))
    recipe = resolve(RecipeConfig(weight_bits=4, activation_observer="minmax"), sites_of(architecture))
    return METHODS["fq-vit"].quantize(model, [jnp.asarray(images[:16])], recipe, jax.random.key(0))


def profile(run: Callable[[], Any], rows: int = 25) -> list[tuple[float, str]]:
    """The operations of one call that take longest, in milliseconds."""
    run()
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            jax.block_until_ready(run())
        data = jax.profiler.ProfileData.from_file(glob.glob(f"{folder}/**/*.xplane.pb", recursive=True)[0])
    took: dict[str, float] = defaultdict(float)
    for plane in data.planes:
        if not plane.name.startswith("/device:"):
            continue
        for line in plane.lines:
            if line.name in ("XLA Modules", "Steps"):
                continue
            for event in line.events:
                took[event.name] += event.duration_ns / 1e6
    return sorted(((ms, name) for name, ms in took.items()), reverse=True)[:rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--architecture", default="deit_base_patch16_224")
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=100)
    parser.add_argument("--passes", type=int, default=10)
    parser.add_argument("--peak-size", type=int, default=8192)
    parser.add_argument("--arithmetics", nargs="+", default=["bf16-codes"])
    parser.add_argument("--profile", action="store_true")
    args = parser.parse_args()
    device = jax.devices()[0]
    print("device", device.device_kind, "jax", jax.__version__, flush=True)
    peaks = matmul_peaks(args.peak_size)
    print("peak, Tops/s", {name: round(peak / 1e12, 1) for name, peak in peaks.items()}, flush=True)
    rng = np.random.default_rng(0)
    for inputs in (192, 768, 3072):
        print("inexact products", inputs, {bits: inexact(rng, inputs, bits) for bits in (4, 8)}, flush=True)
    print("fastest arithmetic", fastest_arithmetic(), flush=True)

    architecture = architecture_named(args.architecture)
    size = architecture.preprocessing.image_size
    images = rng.standard_normal((args.images, size, size, 3), np.float32)
    start = time.perf_counter()
    model = quantized_model(architecture, images)
    print(f"calibrated in {time.perf_counter() - start:.1f} s", flush=True)
    batches = [images[i : i + args.batch] for i in range(0, args.images, args.batch)]
    sizes = (architecture.config.width, architecture.config.num_classes)
    teacher = [
        Output(*(jnp.asarray(rng.standard_normal((len(batch), size)), jnp.float32) for size in sizes))
        for batch in batches
    ]
    mesh = make_mesh()
    space = Space([site for site in model.quantizers if site.endswith(SITES)])
    logits = {}
    for name in args.arithmetics:
        stages = model.stages(Simulated(name), space)
        logits[name] = compute_outputs(stages, lambda a, b: images[a:b], 20).logits
        row = activation_bytes(stages, jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32))
        at_once, width = pieces_at_once(mesh, row, args.images, 1)
        evaluator = Evaluator(stages, batches, teacher, Objective(), at_once, width, mesh)
        depth = architecture.config.depth
        shares, total = [], 0.0
        for index in (depth, *range(depth - 1, 0, -max(1, depth // 4))):
            population = jax.tree.map(lambda leaf: jnp.asarray(leaf)[None], evaluator.stages[index].candidate)
            took = seconds(partial(evaluator.losses, index, population), 3)
            share = operations(architecture, index - 1) * args.images / took / peaks["bf16"]
            shares.append((index - 1, round(1e3 * took, 1), round(share, 3)))
            total += took
        print(name, f"{at_once} images at once; (block, ms, share of bf16 peak):", shares, flush=True)
    first, *others = logits.values()
    print("logits equal in every arithmetic:", all(np.array_equal(first, other) for other in others), flush=True)
    if args.profile:
        population = jax.tree.map(lambda leaf: jnp.asarray(leaf)[None], evaluator.stages[1].candidate)
        for ms, operation in profile(lambda: evaluator.losses(1, population)):
            print(f"  {ms:9.3f} ms  {operation[:110]}")
    if args.passes:
        stages = model.stages(Simulated(), space)
        evaluator = Evaluator(stages, batches, teacher, Objective(), at_once, width, mesh)

        def search(passes: int) -> SearchState:
            return run_search(evaluator, Search(EvolQ(passes=passes), jax.random.key(0)), initial_state(evaluator))

        search(1)  # compiles
        start = time.perf_counter()
        state = search(args.passes)
        took = time.perf_counter() - start
        result = {"passes": args.passes, "evaluations": state.evaluations, "images": args.images, "seconds": took}
        print("published schedule", json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
