"""The closing lines of a command that quantizes."""

from pathlib import Path

from cptv_jax.pipeline.outcome import Quantization
from cptv_jax.report.summary import STAGES, summarize


def print_outcome(outcome: Quantization, out: Path) -> None:
    """Prints the accuracies, the objective, the size and the path of the report.

    Args:
        outcome: The outcome of `quantize`.
        out: The run directory, as the user wrote it.
    """
    summary = summarize(outcome)
    for name, label in STAGES.items():
        if name in summary.accuracies:
            found = summary.accuracies[name]
            print(f"{label:17s} top-1 {found.top1:6.2f} %   top-5 {found.top5:6.2f} %")
    kept = summary.kept
    if kept is not None:
        which = kept.name if kept.number else "the base, as held-out images refused the rest"
        print(f"{'objective':17s} {summary.passes[0].loss:.5f} -> {kept.loss:.5f} ({which})")
    print(f"{'weights':17s} {summary.weight_bytes:,} bytes, {summary.float_bytes:,} in float32")
    for note in summary.notes:
        print(f"{'note':17s} {note}")
    print(f"{'report':17s} {out / 'report.md'}")
