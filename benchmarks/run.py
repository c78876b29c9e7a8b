"""Runs the benchmarks and adds a dated section to benchmarks/RESULTS.md.

    python -m benchmarks.run --weights deit_tiny_patch16_224.safetensors --images imagenet-sample \\
        --eval imagenet-like-eval --torch-python venv-torch/bin/python

Run it from the repository's root. Parts: `compare`, our evaluator and the PyTorch loop in alternating processes, on the
same images and quantizer parameters; `models`, sizes beyond the compared one, with random weights; `growth`, how time
and memory grow with candidates and images. Every number is of this run; medians are over its rounds.
"""

import argparse
import json
import os
import platform
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks import section

PARTS = ("compare", "models", "growth")
# Variants of the PyTorch loop: its published form, and two that go beyond it.
VARIANTS: dict[str, tuple[str, ...]] = {
    "weights quantized every batch": (),
    "weights quantized once a candidate": ("--weights-once",),
    "the same, torch.compile": ("--weights-once", "--compile"),
}
MODELS = {"deit_base_patch16_224": 20, "vit_large_patch16_224": 10}  # images, fit for two cores
RACE = ("--race", "--candidates", "16", "--count", "1000", "--no-forward")  # as a search has them
GROWTH_CANDIDATES, GROWTH_IMAGES = (1, 4, 16), (100, 200, 400)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", required=True, help="safetensors of DeiT-Tiny, or of another timm ViT (--model)")
    parser.add_argument("--model", default="deit_tiny_patch16_224", help="timm's name of the weights")
    parser.add_argument("--images", required=True, help="folder of unlabelled calibration images")
    parser.add_argument("--eval", help="folder of evaluation images; with it, both sides' logits are compared")
    parser.add_argument("--torch-python", help="a Python with torch and timm; needed for the part `compare`")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--rounds", type=int, default=3, help="of the comparison")
    parser.add_argument("--count", type=int, default=100, help="images of the comparison")
    parser.add_argument("--candidates", type=int, default=4, help="for each block, in the comparison")
    parser.add_argument("--batch", type=int, nargs="+", default=[10, 25, 50, 100], help="PyTorch chooses among these")
    parser.add_argument(
        "--arithmetics", nargs="+", default=[], help="of our quantized forward; default: the fastest here"
    )
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("RESULTS.md"))
    parser.add_argument("--raw", type=Path, help="also write all measurements as JSON")
    options = parser.parse_args()
    if "compare" in options.parts and options.torch_python is None:
        parser.error("the part `compare` needs --torch-python")
    return options


def run(python: str, module: str, *arguments: object) -> dict[str, Any]:
    """The JSON object that a benchmark prints last, run in a process of its own."""
    command = [python, "-m", f"benchmarks.{module}", *map(str, arguments)]
    print("+", shlex.join(command), file=sys.stderr, flush=True)
    root = Path(__file__).parent.parent
    done = subprocess.run(command, cwd=root, stdout=subprocess.PIPE, text=True, check=True)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def evaluator(options: argparse.Namespace, arithmetic: str | None, *arguments: object) -> dict[str, Any]:
    chosen = ("--arithmetic", arithmetic) if arithmetic else ()
    return run(sys.executable, "evaluator", *chosen, *arguments)


def compare(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Both sides alternately, `rounds` times: ours in each arithmetic, theirs in each variant and allocator."""
    archive = folder / "parameters.npz"
    given = ("--weights", options.weights, "--images", options.images)
    checked = ("--eval", options.eval) if options.eval else ()
    exported = run(sys.executable, "export_parameters", *given, *checked, "--count", options.count, "--out", archive)
    loop = ("--model", options.model, "--weights", options.weights, "--parameters", archive)
    result: dict[str, Any] = {"export": exported, "ours": {}, "theirs": {}}
    if options.eval:
        result["check"] = run(options.torch_python, "pytorch_loop", *loop, "--check", "--batch", 10)
    batches: dict[str, Sequence[int]] = dict.fromkeys(VARIANTS, options.batch)
    for _ in range(options.rounds):
        for arithmetic in options.arithmetics or [None]:
            arguments = (*given, "--count", options.count, "--candidates", options.candidates)
            measured = evaluator(options, arithmetic, *arguments)
            result["ours"].setdefault(measured["arithmetic"], []).append(measured)
        if "race" not in result:
            result["race"] = evaluator(options, None, *given, *RACE)
        for name, flags in VARIANTS.items():
            arguments = (*loop, *flags, "--images", options.count, "--batch", *batches[name])
            measured = run(options.torch_python, "pytorch_loop", *arguments)
            result["theirs"].setdefault(name, []).append(measured)
            batches[name] = section.best_batches(measured)  # after the first round only the best sizes
    return result


def models(options: argparse.Namespace) -> list[dict[str, Any]]:
    """The evaluator on larger models with random weights and images."""
    return [
        evaluator(options, arithmetic, "--model", name, "--count", count, "--candidates", 2)
        for name, count in MODELS.items()
        for arithmetic in options.arithmetics or [None]
    ]


def growth(options: argparse.Namespace) -> list[dict[str, Any]]:
    """The last block of the compared model, each size in a process of its own."""
    sizes = [(k, GROWTH_IMAGES[0]) for k in GROWTH_CANDIDATES] + [(GROWTH_CANDIDATES[1], n) for n in GROWTH_IMAGES[1:]]
    common = ("--weights", options.weights, "--images", options.images, "--blocks", "-1")
    return [evaluator(options, None, *common, "--candidates", k, "--count", n, "--no-forward") for k, n in sizes]


def machine() -> dict[str, Any]:
    """What the numbers were measured on."""
    names = [line.split(":", 1)[1].strip() for line in _cpuinfo() if line.startswith("model name")]
    return {
        "cpu": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "memory_gib": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30,
        "python": platform.python_version(),
        "jax": version("jax"),
        "jaxlib": version("jaxlib"),
        "flax": version("flax"),
    }


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text(encoding="utf-8").splitlines() if path.exists() else []


def _without_folder(word: str) -> str:
    """A path without the folders of this machine, which say nothing to whoever reads the command."""
    return Path(word).name if Path(word).is_absolute() else word


def main() -> None:
    options = parse()
    measured: dict[str, Any] = {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "command": shlex.join(["python", "-m", "benchmarks.run", *map(_without_folder, sys.argv[1:])]),
        "machine": machine(),
        "load_before": os.getloadavg()[0],
    }
    with tempfile.TemporaryDirectory() as folder:
        if "compare" in options.parts:
            measured["compare"] = compare(options, Path(folder))
    if "models" in options.parts:
        measured["models"] = models(options)
    if "growth" in options.parts:
        measured["growth"] = growth(options)
    measured["load_after"] = os.getloadavg()[0]
    if options.raw:
        options.raw.write_text(json.dumps(measured, indent=1), encoding="utf-8")
    text = section.render(measured)
    print(text)
    old = options.out.read_text(encoding="utf-8") if options.out.exists() else section.PREAMBLE
    options.out.write_text(f"{old.rstrip()}\n\n{text}", encoding="utf-8")


if __name__ == "__main__":
    main()
