"""The report of a quantization as Markdown."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from cptv_jax.config.schema import to_mapping
from cptv_jax.models.architecture import sites_of
from cptv_jax.quantizers import LowRank, Quantizer
from cptv_jax.recipe.spec import SiteSpec
from cptv_jax.storage.files import versions, write_atomically

if TYPE_CHECKING:
    from cptv_jax.pipeline.outcome import Quantization
from cptv_jax.report.plots import plot_losses, plot_proposals

_ROWS = (("float", "full precision"), ("base", "base method"), ("final", "after the search"))


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
    """Markdown table of every site of the architecture: quantized how, or in float."""
    lines = ["| site | quantizer | bits | granularity | parameters from |", "|---|---|---|---|---|"]
    specs, quantizers = outcome.model.recipe.sites, outcome.model.quantizers
    for site in sites_of(outcome.teacher.architecture):
        if site.name in specs:
            lines.append(f"| `{site.name}` {_describe(specs[site.name], quantizers[site.name])}")
        elif site.kind != "operand":  # an operand is a part of a tensor that has its own row
            lines.append(f"| `{site.name}` | float | | | |")
    return "\n".join(lines)


def _accuracy(results: dict[str, Any]) -> str:
    if not results:
        return "No evaluation images were given."
    lines = ["| model | top-1 % | top-5 % | images |", "|---|---|---|---|"]
    for key, name in _ROWS:
        if key in results:
            r = results[key]
            lines.append(f"| {name} | {r['top1']:.2f} | {r['top5']:.2f} | {r['images']} |")
    return "\n".join(lines)


def _search_summary(outcome: "Quantization") -> str:
    if not outcome.log:
        return "No search was run."
    lines = ["| after | loss on search images | loss on held-out images | evaluations |", "|---|---|---|---|"]
    for record in outcome.log:
        if record["event"] in ("start", "pass"):
            name = "base method" if record["event"] == "start" else f"pass {record['pass']}"
            held_out = "" if record["held_out"] is None else f"{record['held_out']:.5f}"
            lines.append(f"| {name} | {record['loss']:.5f} | {held_out} | {record.get('evaluations', 1)} |")
    accepted = sum(record["event"] == "accepted" for record in outcome.log)
    chosen = "last row" if outcome.log[0]["held_out"] is None else "row with the least held-out loss"
    lines += ["", f"{accepted} steps were accepted; the {chosen} is the result."]
    return "\n".join(lines)


def write_report(directory: Path, outcome: "Quantization") -> Path:
    """Writes report.md, and loss.png where there was a search (and proposals.png where gradients proposed); returns the
    path of report.md.
    """
    directory.mkdir(parents=True, exist_ok=True)
    recipe, teacher = outcome.model.recipe, outcome.teacher
    curve = ""
    if outcome.log:
        plot_losses(directory / "loss.png", outcome.log)
        curve = "\n![Loss of accepted steps](loss.png)\n"
        if any(record.get("batch_losses") for record in outcome.log):
            plot_proposals(directory / "proposals.png", outcome.log)
            curve += "\n![What the gradients lowered](proposals.png)\n"
    environment = ", ".join(f"{name} {number}" for name, number in versions().items())
    reconstructed = ", blocks reconstructed" if outcome.config.reconstruction.steps else ""
    text = f"""# {teacher.architecture.name}, {outcome.config.method}{reconstructed}, recipe {recipe.name}

Weights: {teacher.source or "given as arrays"}{f" (sha256 {teacher.sha256[:16]}...)" if teacher.sha256 else ""}.
{"Fully quantized" if recipe.scope == "full" else "Matmul-only: weights and what linear layers and matmuls read"}; \
LayerNorm runs in {"integer" if recipe.integer_layer_norm else "float"} arithmetic, softmax in \
{"integer (log-int-softmax)" if recipe.log_int_softmax else "float"}.{"".join(f" {r}" for r in recipe.remarks)}

## Accuracy

{_accuracy(outcome.results)}

## Search

{_search_summary(outcome)}
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
