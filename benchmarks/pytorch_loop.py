"""The published search loop in PyTorch, timed: the whole network on every image for one candidate at a time.

    python -m benchmarks.pytorch_loop --parameters p.npz --weights deit_tiny_patch16_224.safetensors
    python -m benchmarks.pytorch_loop --model deit_base_patch16_224        (random weights and images)

Run it from the repository's root with a Python that has torch and timm (benchmarks/README.md). The archive comes from
benchmarks.export_parameters. It prints one JSON object. glibc's allocator returns large tensors to the system and
faults them in again, so every measurement is made in two processes: with its defaults and with `TUNED`.

As the published code: float32 fake quantization, one candidate at a time, every image through every layer, all weights
quantized again for every batch. Where PyTorch has a faster way to the same numbers it is taken: in-place operations,
exponent bits for log2, moments without torch.std_mean. Beyond the published form, as options: `--weights-once`
quantizes weights once per candidate, `--compile` fuses the operations of a block.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

TUNED = {"MALLOC_MMAP_THRESHOLD_": "8589934592", "MALLOC_TRIM_THRESHOLD_": "8589934592"}
ALLOCATORS: dict[str, dict[str, str]] = {"default": {}, "tuned": TUNED}
TEMPERATURE, LOSS_BATCH = 3.0, 100


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="deit_tiny_patch16_224", help="timm's name")
    parser.add_argument("--weights", type=Path, help="safetensors; random weights without it")
    parser.add_argument("--parameters", type=Path, help="archive of export_parameters; ranges of one batch without it")
    parser.add_argument("--images", type=int, default=100)
    parser.add_argument("--batch", type=int, nargs="+", default=[10, 25, 50, 100], help="images at once, each is timed")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--repeats", type=int, default=1, help="of each measurement; the fastest counts")
    parser.add_argument("--allocator", choices=[*ALLOCATORS, "both"], default="both")
    parser.add_argument(
        "--weights-once", action="store_true", help="quantize weights once per candidate, not per batch"
    )
    parser.add_argument("--compile", action="store_true", help="torch.compile each block")
    parser.add_argument("--check", action="store_true", help="compare logits with those in the archive, time nothing")
    return parser.parse_args(arguments)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Images per second of the float forward and of a candidate's evaluation, by batch size."""
    import numpy as np
    import torch

    from benchmarks import pytorch_model as models
    from benchmarks.pytorch_fake_quant import block

    torch.set_num_threads(options.threads)
    model = models.float_model(options.model, options.weights)
    archive = None if options.parameters is None else np.load(options.parameters)
    with torch.inference_mode():
        if archive is None:
            images = torch.randn(options.images, 3, 224, 224, generator=torch.Generator().manual_seed(0))
            quantizers = models.quantizers_by_range(model, images[:4], weight_bits=4)
        else:
            name = "eval_pixels" if options.check else "pixels"
            images = models.normalized(archive[name], archive["mean"], archive["std"])[: options.images]
            quantizers = models.quantizers_from(archive, model)
        compiled = torch.compile(block, dynamic=False) if options.compile else block
        quantized = models.QuantizedViT(model, quantizers, compiled)
        if options.check:
            return _check(quantized, images, archive, options.batch[0])
        return _time(quantized, images, options)


def _batches(images: Any, size: int) -> list[Any]:
    return [images[i : i + size] for i in range(0, len(images), size)]


def _check(quantized: Any, images: Any, archive: Any, batch: int) -> dict[str, Any]:
    import torch

    result: dict[str, Any] = {"images": len(images)}
    weights = quantized.weights()
    ours = {name: archive[f"{name}_logits"][: len(images)] for name in ("float", "quantized")}
    theirs = {
        "float": torch.cat([quantized.model(x) for x in _batches(images, batch)]).numpy(),
        "quantized": torch.cat([quantized(x, weights) for x in _batches(images, batch)]).numpy(),
    }
    for name in ours:
        difference = abs(ours[name] - theirs[name])
        result[name] = {
            "mean_difference": float(difference.mean()),
            "largest_difference": float(difference.max()),
            "differing_predictions": int((ours[name].argmax(-1) != theirs[name].argmax(-1)).sum()),
        }
    result["mean_effect_of_quantization"] = float(abs(ours["float"] - ours["quantized"]).mean())
    return result


def _time(quantized: Any, images: Any, options: argparse.Namespace) -> dict[str, Any]:
    import torch
    import torch.nn.functional as F

    def loss(student: Any, teacher: Any) -> float:
        """infoNCE, mean over batches of LOSS_BATCH images (CPT-V, equation 4)."""
        total = []
        for q, k in zip(student.split(LOSS_BATCH), teacher.split(LOSS_BATCH), strict=True):
            similarity = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).T
            own = torch.arange(len(q))
            total.append(F.cross_entropy(similarity / TEMPERATURE, own) * (2 * TEMPERATURE))
        return float(torch.stack(total).mean())

    teacher = torch.cat([quantized.model(x) for x in _batches(images, 10)])
    sites = [f"blocks.{len(quantized.model.blocks) // 2}.attn.{layer}.weight" for layer in ("qkv", "proj")]
    start = {site: quantized.quantizers[site].scale for site in sites}
    generator = torch.Generator().manual_seed(0)
    losses = []

    def float_forward(batch: int) -> None:
        for x in _batches(images, batch):
            quantized.model(x)

    def candidate(batch: int) -> None:
        for site, scale in start.items():
            step = torch.rand(scale.shape, generator=generator) * 2e-3 - 1e-3
            quantized.set_scale(site, (scale + step).abs())
        weights = quantized.weights() if options.weights_once else None
        outputs = [quantized(x, weights or quantized.weights()) for x in _batches(images, batch)]
        losses.append(loss(torch.cat(outputs), teacher))

    result: dict[str, Any] = {"images": len(images), "threads": torch.get_num_threads()}
    for name, work in (("float", float_forward), ("candidate", candidate)):
        result[name] = {}
        for batch in options.batch:
            if len(images) % batch == 0:
                result[name][batch] = _images_per_second(partial(work, batch), options.repeats, len(images))
    return {**result, "loss": losses[-1], "torch": torch.__version__}


def _images_per_second(work: Callable[[], None], repeats: int, images: int) -> float:
    work()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return round(images / min(seconds), 2)


def main() -> None:
    options = parse()
    if options.allocator != "both" or options.check:
        print(json.dumps(measure(options)))
        return
    results = {}
    for name, setting in ALLOCATORS.items():
        environment = {key: value for key, value in os.environ.items() if key not in TUNED} | setting
        command = [sys.executable, "-m", "benchmarks.pytorch_loop", *sys.argv[1:], "--allocator", name]
        run = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True, text=True)
        results[name] = json.loads(run.stdout.splitlines()[-1])
    print(json.dumps(results))


if __name__ == "__main__":
    main()
