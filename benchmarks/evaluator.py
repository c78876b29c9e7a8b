"""Times the evaluator: candidates of every block, in images x candidates per second.

    python -m benchmarks.evaluator --weights deit_tiny_patch16_224.safetensors --images imagenet-sample
    python -m benchmarks.evaluator --model vit_large_patch16_224 --blocks 23 --count 100 --candidates 16

Without weights or images they are random. It prints one JSON object. A pass evaluates K candidates in every block, last
to first; the prefix cache is made within it, once. Programs are compiled before, and their time is reported apart.
"""

import argparse
import json
import resource
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.peak import OPERANDS, matmul_flops, matmul_peak
from cptv_jax import (
    Evaluator,
    Images,
    Model,
    Objective,
    QuantizedModel,
    RecipeConfig,
    Stage,
    architecture_named,
    images_from_arrays,
    load_float_model,
    load_images,
    resolve,
)
from cptv_jax.methods.registry import METHODS
from cptv_jax.models.architecture import sites_of
from cptv_jax.quantized.candidate import Space
from cptv_jax.quantized.execution import Simulated
from cptv_jax.runtime.arithmetics import fastest_arithmetic
from cptv_jax.runtime.forward import activation_bytes, compute_outputs
from cptv_jax.runtime.mesh import make_mesh, pieces_at_once, use_all_cores
from cptv_jax.search import RacingEvaluator

SEARCHED = (".attn.qkv.weight", ".attn.proj.weight")  # what the published code searches
_MUTATION = 1e-3


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="deit_tiny_patch16_224", help="timm's name")
    parser.add_argument("--weights", help="file of timm weights; random without it")
    parser.add_argument("--images", help="folder of unlabelled calibration images; noise without it")
    parser.add_argument("--count", type=int, default=100, help="images N")
    parser.add_argument("--batch", type=int, default=100, help="images that the contrastive loss couples")
    parser.add_argument("--images-at-once", type=int, help="default: what the device has room for")
    parser.add_argument("--width", type=int, help="candidates at once; default: likewise")
    parser.add_argument("--memory-gib", type=float, help="bound on the activations of each device")
    parser.add_argument("--candidates", type=int, nargs="+", default=[4], help="K; several give several passes")
    parser.add_argument("--blocks", type=int, nargs="+", help="evaluate only these blocks; -1 is the last")
    parser.add_argument("--race", action="store_true", help="early rejection: successive halving over the batches")
    parser.add_argument("--no-forward", action="store_true", help="do not time whole forward passes")
    parser.add_argument("--arithmetic", choices=[*OPERANDS], help="default: the model's own choice")
    parser.add_argument("--weight-bits", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=1, help="of each forward pass; the fastest counts")
    return parser.parse_args()


def float_model(options: argparse.Namespace) -> Model:
    """The teacher: the model in --weights, or --model with random weights."""
    if options.weights:
        return load_float_model(options.weights)
    architecture = architecture_named(options.model)
    return Model(architecture, architecture.initialize(0))


def input_images(options: argparse.Namespace, model: Model) -> Images:
    """--count calibration images, or noise of the model's input size."""
    preprocessing = model.architecture.preprocessing
    if options.images:
        return load_images(
            options.images, preprocessing, labels=False, limit=options.count, need=options.count, progress=False
        )
    shape = (options.count, preprocessing.image_size, preprocessing.image_size, len(preprocessing.mean))
    pixels = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    return images_from_arrays(pixels, preprocessing=preprocessing)


def calibrated(model: Model, images: Images, weight_bits: int, count: int = 10) -> QuantizedModel:
    """The `evol-q` base, with parameters from the first few images: good enough to time."""
    config = RecipeConfig(preset="evol-q", weight_bits=weight_bits, activation_bits=8)
    recipe = resolve(config, sites_of(model.architecture))
    batch = jnp.asarray(images.normalize(0, min(count, len(images))))
    return METHODS["fq-vit"].quantize(model, [batch], recipe, jax.random.key(0))


def population(candidate: Any, count: int, seed: int) -> Any:
    """Candidates [count, ...] around one, as the published mutation makes them."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: np.abs(np.asarray(leaf) + rng.uniform(-_MUTATION, _MUTATION, (count, *leaf.shape))), candidate
    )


def seconds(work: Callable[[], Any]) -> float:
    """Wall time of one call, its result included."""
    start = time.perf_counter()
    jax.block_until_ready(work())
    return time.perf_counter() - start


def images_per_second(stages: Sequence[Stage], inputs: np.ndarray, repeats: int) -> float:
    """Of a whole forward pass on all devices, after one to compile. inputs: normalised images, on the host."""
    times = [
        seconds(lambda: compute_outputs(stages, lambda i, j: inputs[i:j], len(inputs))) for _ in range(repeats + 1)
    ]
    return len(inputs) / min(times[1:])


def time_pass(evaluator: Evaluator, indices: Sequence[int], count: int) -> dict[str, Any]:
    """Seconds of a new evaluator's pass: `count` candidates at each stage of `indices`, in that order.

    refresh: what the first stage's evaluation costs beyond the same evaluation again, the making of the prefix cache.
    stages: without it.
    """
    times: dict[str, list[float]] = {}
    for index in [indices[0], *indices]:
        stage = evaluator.stages[index]
        candidates = population(stage.candidate, count, index)
        elapsed = seconds(lambda i=index, c=candidates: evaluator.losses(i, c))  # type: ignore[misc]
        times.setdefault(stage.name, []).append(elapsed)
    first = times[evaluator.stages[indices[0]].name]
    return {
        "refresh": max(0.0, first[0] - first[-1]),
        "stages": {name: measured[-1] for name, measured in times.items()},
    }


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Everything about one model and one arithmetic."""
    use_all_cores()
    model = float_model(options)
    images = input_images(options, model)
    base = calibrated(model, images, options.weight_bits)
    stages = base.stages(
        Simulated(options.arithmetic), Space([site for site in base.quantizers if site.endswith(SEARCHED)])
    )
    mesh = make_mesh()
    batch = min(options.batch, options.count)
    starts = range(0, options.count // batch * batch, batch)
    count = len(starts) * batch
    inputs = images.normalize(0, count)
    result: dict[str, Any] = {
        "model": model.architecture.name,
        "arithmetic": options.arithmetic or fastest_arithmetic(),
        "images": count,
        "batches": len(starts),
        "race": options.race,
        "backend": jax.default_backend(),
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "jax": jax.__version__,
        "memory_before_mib": peak_memory(),
    }
    if not options.no_forward:
        result["float"] = images_per_second(model.stages(), inputs, options.repeats)
        result["quantized"] = images_per_second(stages, inputs, options.repeats)

    batches = [inputs[start : start + batch] for start in starts]
    teacher = [compute_outputs(model.stages(), lambda i, j, x=x: x[i:j], batch) for x in batches]  # type: ignore[misc]
    indices = [i for i, stage in reversed(list(enumerate(stages))) if stage.searchable]
    if options.blocks:
        wanted = [indices[::-1][block] for block in options.blocks]
        indices = [i for i in indices if i in wanted]
    flops = matmul_flops(model.architecture.config)
    row = activation_bytes(stages, jax.ShapeDtypeStruct((1, *batches[0].shape[1:]), jnp.float32))
    budget = None if options.memory_gib is None else options.memory_gib * 2**30
    result["passes"] = []
    for candidates in options.candidates:
        at_once, width = pieces_at_once(mesh, row, count, candidates, budget)
        at_once, width = options.images_at_once or at_once, options.width or width

        def evaluator(used: int, race: bool = options.race, at_once: int = at_once, width: int = width) -> Evaluator:
            kind = RacingEvaluator if race else Evaluator
            return kind(stages, batches[:used], teacher[:used], Objective(), at_once, width, mesh)

        def warm_up(candidates: int = candidates) -> None:
            warm = evaluator(1, False)
            for index in (indices[0], indices[-1]):
                warm.loss_of(index, stages[index].candidate)
            if options.race:  # the last block is enough: it is losses of parts of the batches that are new
                evaluator(len(batches)).losses(indices[0], population(stages[indices[0]].candidate, candidates, 0))

        compilation = seconds(warm_up)
        times = time_pass(evaluator(len(batches)), indices, candidates)
        total = sum(times["stages"].values())
        evaluated = count * candidates * len(indices)
        work = sum(sum(list(flops.values())[i:]) for i in indices) * count * candidates
        result["passes"].append(
            {
                "candidates": candidates,
                "images_at_once": at_once,
                "candidates_at_once": width,
                "images_candidates_per_second": evaluated / (total + times["refresh"]),
                "gflops": work / total / 1e9,
                "warm_up_seconds": compilation,
                **times,
            }
        )
    result["peak_memory_mib"] = peak_memory()  # of the evaluator, before the peak of the matmul is measured
    result["peak_gflops"] = {name: matmul_peak(name) for name in OPERANDS}
    result["gigaflops_of_one_image"] = sum(flops.values()) / 1e9
    return result


def peak_memory() -> float:
    """Largest resident set of this process so far, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    print(json.dumps(measure(parse())))


if __name__ == "__main__":
    main()
