"""The report of a quantization as Markdown."""

from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from cptv_jax.models.architecture import sites_of
from cptv_jax.options import to_mapping
from cptv_jax.quantizers import LowRank, Quantizer
from cptv_jax.recipe.spec import SiteSpec
from cptv_jax.report.plots import plot_losses, plot_proposals
from cptv_jax.report.summary import STAGES, Summary, summarize
from cptv_jax.search.events import Proposed
from cptv_jax.storage.files import versions, write_atomically

if TYPE_CHECKING:
    from cptv_jax.pipeline.outcome import Quantization


def _describe(spec: SiteSpec, quantizer: Quantizer) -> str:
    grid = f"{'signed ' if spec.signed else 'unsigned '}{'symmetric' if spec.symmetric else 'asymmetric'}"
    granularity = "per channel" if spec.per_channel else "per head" if spec.per_head else "per tensor"
    if spec.parts > 1:
        granularity = f"{spec.parts} parts"
    correction = ", bias correction" if spec.bias_correction else ""
    if spec.quantizer == "log2":
        return f"| log2 | {spec.bits} | per tensor | fixed levels |"
    if spec.quantizer == "log-sqrt2":
        return f"| log-sqrt2 | {spec.bits} | per tensor | {spec.observer} |"
    if spec.quantizer == "focusing":
        return f"| focusing (one interval) | {spec.bits} | {granularity} | {spec.observer} |"
    if isinstance(quantizer, LowRank):
        correction += f", float term of rank {int(quantizer.rank)}"
    if spec.quantizer in ("twin-softmax", "twin-gelu"):
        return f"| {spec.quantizer} | {spec.bits} | {granularity} | {spec.observer} |"
    return f"| {spec.quantizer} {grid} | {spec.bits} | {granularity} | {spec.observer}{correction} |"


def site_table(outcome: "Quantization") -> str:
    """Lists every site of the architecture.

    Args:
        outcome: The outcome of `quantize`.

    Returns:
        A Markdown table that says how each is quantized, or that it stays in float.
    """
    lines = ["| site | quantizer | bits | granularity | parameters from |", "|---|---|---|---|---|"]
    specs, quantizers = outcome.model.recipe.sites, outcome.model.quantizers
    for site in sites_of(outcome.teacher.architecture):
        if site.name in specs:
            lines.append(f"| `{site.name}` {_describe(specs[site.name], quantizers[site.name])}")
        elif site.kind != "operand":  # an operand is a part of a tensor that has its own row
            lines.append(f"| `{site.name}` | float | | | |")
    return "\n".join(lines)


def _accuracy(summary: Summary) -> str:
    if not summary.accuracies:
        return "No evaluation images were given."
    lines = ["| model | top-1 % | top-5 % | images |", "|---|---|---|---|"]
    for key, name in STAGES.items():
        if key in summary.accuracies:
            found = summary.accuracies[key]
            lines.append(f"| {name} | {found.top1:.2f} | {found.top5:.2f} | {found.images} |")
    return "\n".join(lines)


def _search(summary: Summary) -> str:
    if not summary.passes:
        return "No search was run."
    lines = ["| after | loss on search images | loss on held-out images | evaluations |", "|---|---|---|---|"]
    for row in summary.passes:
        held_out = "" if row.held_out is None else f"{row.held_out:.5f}"
        lines.append(f"| {row.name} | {row.loss:.5f} | {held_out} | {row.evaluations} |")
    chosen = "row with the least held-out loss" if summary.passes[0].held_out is not None else "last row"
    lines += ["", f"{summary.accepted} steps were accepted; the {chosen} is the result."]
    if summary.changes:
        changed = ", ".join(f"{one.changed} of {one.total} {one.kind}" for one in summary.changes)
        lines += ["", f"The result differs from the base method in {changed}."]
    return "\n".join(lines)


def write_report(directory: Path, outcome: "Quantization") -> Path:
    """Writes the report of a quantization.

    Args:
        directory: Receives report.md, loss.png if there was a search, and proposals.png if gradients proposed.
        outcome: The outcome of `quantize`.

    Returns:
        The path of report.md.
    """
    directory.mkdir(parents=True, exist_ok=True)
    recipe, teacher, summary = outcome.model.recipe, outcome.teacher, summarize(outcome)
    curve = ""
    if outcome.log:
        plot_losses(directory / "loss.png", outcome.log)
        curve = "\n![Loss of accepted steps](loss.png)\n"
        if any(isinstance(event, Proposed) and event.batch_losses for event in outcome.log):
            plot_proposals(directory / "proposals.png", outcome.log)
            curve += "\n![What the gradients lowered](proposals.png)\n"
    environment = ", ".join(f"{name} {number}" for name, number in versions().items())
    reconstructed = ", blocks reconstructed" if outcome.config.reconstruction.steps else ""
    notes = "".join(f"\n{note}\n" for note in summary.notes)
    text = f"""# {teacher.architecture.name}, {outcome.config.method.name}{reconstructed}, recipe {recipe.name}

Weights: {teacher.source or "given as arrays"}{f" (sha256 {teacher.sha256[:16]}...)" if teacher.sha256 else ""}.
{"Fully quantized" if recipe.scope == "full" else "Matmul-only: weights and what linear layers and matmuls read"}; \
LayerNorm runs in {"integer" if recipe.integer_layer_norm else "float"} arithmetic, softmax in \
{"integer (log-int-softmax)" if recipe.log_int_softmax else "float"}.
Quantized weights take {summary.weight_bytes:,} bytes, {summary.float_bytes:,} in float32.
{notes}
## Accuracy

{_accuracy(summary)}

## Search

{_search(summary)}
{curve}
## What is and what is not quantized

{site_table(outcome)}

## Configuration

```yaml
{yaml.safe_dump(to_mapping(outcome.config), sort_keys=False).strip()}
```

{environment}
"""
    path = directory / "report.md"
    write_atomically(path, text)
    return path
