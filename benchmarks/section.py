"""Turns the measurements of benchmarks.run into a section of RESULTS.md."""

from collections.abc import Iterable, Sequence
from statistics import median
from typing import Any

PREAMBLE = """# Results

Each section is one run of `python -m benchmarks.run`, or of the script that it names; README.md describes both. Ratios
compare numbers of the same run. Load averages beyond zero at its start mean that other jobs had a part of the machine.
"""

# The published schedule: 10 passes over 12 blocks, 4 evaluations of 1,000 images at each.
PASSES, EVALUATIONS_A_BLOCK, IMAGES = 10, 4, 1000

Row = Sequence[object]


def table(head: Row, rows: Iterable[Row]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines) + "\n"


def best_batches(measured: dict[str, Any]) -> list[int]:
    """The batch sizes at which a PyTorch variant was fastest, under each allocator and in each measurement."""
    best = {int(max(rates, key=rates.get)) for run in measured.values() for rates in (run["float"], run["candidate"])}
    return sorted(best)


def _fastest(rounds: Sequence[dict[str, Any]], allocator: str, kind: str) -> tuple[float, int]:
    """Median over the rounds at the batch size where that is highest, and this size."""
    sizes = set.intersection(*(set(one[allocator][kind]) for one in rounds))
    medians = {size: median(one[allocator][kind][size] for one in rounds) for size in sizes}
    size = max(medians, key=lambda s: medians[s])
    return medians[size], int(size)


def _minutes(seconds: float) -> str:
    return f"{seconds / 60:.1f} min"


def _pass_rate(one: dict[str, Any]) -> float:
    rate: float = one["passes"][0]["images_candidates_per_second"]
    return rate


def _schedule_seconds(one: dict[str, Any]) -> float:
    """The published schedule's wall time, from a measured pass: evaluations and caches grow with images and passes."""
    measured = one["passes"][0]
    evaluation = sum(measured["stages"].values()) / measured["candidates"] / one["images"]  # of each block once
    refresh = measured["refresh"] / one["images"]
    return PASSES * IMAGES * (EVALUATIONS_A_BLOCK * evaluation + refresh)


def _compare(compared: dict[str, Any]) -> str:
    ours = {
        name: {key: median(one[key] for one in measured) for key in ("float", "quantized")}
        for name, measured in compared["ours"].items()
    }
    passes = {name: median(map(_pass_rate, measured)) for name, measured in compared["ours"].items()}
    rounds = next(iter(compared["ours"].values()))
    one = rounds[0]
    kind = one["passes"][0]
    rows: list[Row] = []
    for name, rates in ours.items():
        rows.append(
            (f"cptv_jax, {name}: pass over {len(kind['stages'])} blocks, every image", f"{passes[name]:.1f}", "")
        )
        rows.append((f"cptv_jax, {name}: one quantized forward", f"{rates['quantized']:.1f}", ""))
        rows.append((f"cptv_jax, {name}: float forward", f"{rates['float']:.1f}", ""))
    race = compared["race"]
    raced = _pass_rate(race)
    rows.append((f"cptv_jax, {race['arithmetic']}: pass with early rejection", f"{raced:.1f}", ""))
    theirs: dict[tuple[str, str], float] = {}
    for variant, measured in compared["theirs"].items():
        for allocator in measured[0]:
            rate, size = _fastest(measured, allocator, "candidate")
            theirs[variant, allocator] = rate
            rows.append((f"PyTorch, {variant}, {allocator} allocator: candidate", f"{rate:.1f}", size))
    for allocator in next(iter(compared["theirs"].values()))[0]:
        rate, size = max(_fastest(measured, allocator, "float") for measured in compared["theirs"].values())
        rows.append((f"PyTorch, {allocator} allocator: float forward", f"{rate:.1f}", size))

    best_ours = max(passes, key=lambda name: passes[name])
    forward = max(rates["quantized"] for rates in ours.values())
    ratios = [
        (
            f"{variant}, {allocator}",
            f"{passes[best_ours] / rate:.1f}",
            f"{raced / rate:.1f}",
            f"{forward / rate:.1f}",
        )
        for (variant, allocator), rate in theirs.items()
    ]
    schedule = median(map(_schedule_seconds, compared["ours"][best_ours]))
    images = PASSES * EVALUATIONS_A_BLOCK * len(kind["stages"]) * IMAGES
    fastest = max(theirs.values())
    parts = [
        f"### {one['model']}, W4A8, against the PyTorch loop",
        f"{one['images']} images, {kind['candidates']} candidates a block, medians of {len(rounds)} "
        "alternating rounds. A pass includes the making of its prefix cache. Early rejection: one pass with "
        f"{race['passes'][0]['candidates']} candidates a block, {race['images']} images in {race['batches']} batches, "
        "all of them counted.",
        table(("what", "images (x candidates) a second", "batch"), rows),
        f"Ratios, cptv_jax ({best_ours}) over PyTorch:",
        table(("PyTorch", "whole pass", "pass with early rejection", "single quantized forward"), ratios),
        f"The published schedule ({PASSES} passes, {images // IMAGES} evaluations of {IMAGES} images), projected from "
        f"the measured pass: cptv_jax {_minutes(schedule)}, PyTorch's fastest {_minutes(images / fastest)}.",
    ]
    if "check" in compared:
        check = compared["check"]
        parts.append(
            "Quantized logits of both sides, same parameters, "
            f"{check['images']} evaluation images: mean difference {check['quantized']['mean_difference']:.3f}, "
            f"{check['quantized']['differing_predictions']} predictions differ. Our own logits move by "
            f"{compared['export']['floor_mean']:.3f} ({compared['export']['floor_predictions']} predictions) when the "
            "weights are multiplied by 1 + 1e-7 N(0, 1), and quantization moves them by "
            f"{check['mean_effect_of_quantization']:.3f}."
        )
    return "\n\n".join(part.rstrip() for part in parts)


def _evaluators(title: str, runs: Sequence[dict[str, Any]]) -> str:
    """Throughput and fraction of the peak of the fastest type of operand, whichever the arithmetic uses."""
    rows = []
    for one in runs:
        work = one["gigaflops_of_one_image"]
        peak_name, peak = max(one["peak_gflops"].items(), key=lambda item: item[1])
        for measured in one["passes"]:
            rows.append(
                (
                    one["model"],
                    one["arithmetic"],
                    f"{measured['candidates']} x {one['images']}",
                    f"{measured['images_candidates_per_second']:.2f}",
                    f"{measured['gflops']:.0f}",
                    f"{100 * measured['gflops'] / peak:.0f} % of {peak:.0f} ({peak_name})",
                    f"{one['quantized']:.2f} ({100 * one['quantized'] * work / peak:.0f} %)",
                    f"{one['float']:.2f}",
                    f"{one['peak_memory_mib'] / 1024:.1f}",
                )
            )
    head = (
        "model",
        "arithmetic",
        "candidates x images",
        "images x candidates a second",
        "GFLOP/s",
        "of the measured matmul peak",
        "quantized forward, images a second",
        "float forward",
        "peak memory, GiB",
    )
    return f"### {title}\n\n{table(head, rows)}"


def _growth(runs: Sequence[dict[str, Any]]) -> str:
    rows = [
        (
            measured["candidates"],
            one["images"],
            f"{sum(measured['stages'].values()):.2f}",
            f"{one['peak_memory_mib']:.0f}",
        )
        for one in runs
        for measured in one["passes"]
    ]
    head = ("candidates", "images", "seconds, last block", "peak memory, MiB")
    return f"### Growth with candidates and images\n\n{table(head, rows)}"


def _depth(one: dict[str, Any]) -> str:
    measured = one["passes"][0]
    rows = [(name, f"{elapsed:.2f}") for name, elapsed in measured["stages"].items()]
    title = f"### Growth with depth: {measured['candidates']} candidates x {one['images']} images"
    return f"{title}\n\n{table(('candidates of', 'seconds'), rows)}"


def render(measured: dict[str, Any]) -> str:
    """The section, Markdown."""
    machine, compared = measured["machine"], measured.get("compare")
    libraries = [f"{name} {machine[name]}" for name in ("python", "jax", "jaxlib", "flax")]
    if compared:
        libraries.append("torch " + next(iter(compared["theirs"].values()))[0]["tuned"]["torch"])
    parts = [
        f"## {measured['date']}: {machine['cpu']}, {machine['cores']} cores, {machine['memory_gib']:.0f} GiB",
        f"{', '.join(libraries)}; load average {measured['load_before']:.1f} before and {measured['load_after']:.1f} "
        "after.",
        f"```bash\n{measured['command']}\n```",
    ]
    if compared:
        parts.append(_compare(compared))
        parts.append(_evaluators("Of the measured peak", [rounds[-1] for rounds in compared["ours"].values()]))
        parts.append(_depth(next(iter(compared["ours"].values()))[-1]))
    if "models" in measured:
        parts.append(_evaluators("Larger models, random weights", measured["models"]))
    if "growth" in measured:
        parts.append(_growth(measured["growth"]))
    return "\n\n".join(part.rstrip() for part in parts) + "\n"
