"""The table of a bench of methods: measurements by width and method, one line without and one with CPT-V."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

SCOPES = {"full": "fully quantized", "matmuls": "matmul-only"}
_HEADER = (
    "bits", "method", "recipe", "what is quantized", "CPT-V", "top-1 %", "objective", "KL", "seconds", "peak MiB",
    "images", "remark",
)  # fmt: skip


@dataclass(frozen=True)
class Cell:
    """One run of a bench and its result.

    Attributes:
        bits: The widths, such as W4A8.
        label: Name of the method in the table.
        seed: The run's seed.
        search: Name of the strategy, or "none".
        measured: See `worker.measure`; empty if there is nothing yet.
        reason: Why there is nothing.
    """

    bits: str
    label: str
    seed: int
    search: str
    measured: dict[str, Any]
    reason: str = ""

    @property
    def done(self) -> bool:
        """Whether the run was measured to its end."""
        return bool(self.measured.get("done"))


def lines_of(cells: Sequence[Cell]) -> list[dict[str, Any]]:
    """Turns cells into the table's lines: for each width and method, the seeds' values of the base, then of the search.

    Args:
        cells: The cells.

    Returns:
        The lines, as plain data.
    """
    grouped: dict[tuple[str, str], list[Cell]] = {}
    for cell in cells:
        grouped.setdefault((cell.bits, cell.label), []).append(cell)
    lines = []
    for (bits, label), group in grouped.items():
        done = [cell for cell in group if cell.done]
        reasons = [f"seed {cell.seed}: {cell.reason}" if len(group) > 1 else cell.reason for cell in group]
        for stage, phase in (("base", "base"), ("final", "search")):
            search = group[0].search if stage == "final" else "none"
            if stage == "final" and (search == "none" or not done):
                continue
            line: dict[str, Any] = {"bits": bits, "method": label, "search": search}
            line["seeds"] = [cell.seed for cell in done]
            line["top1"] = [cell.measured["accuracy"][stage]["top1"] for cell in done]
            line["objective"] = [cell.measured["objective"].get(stage) for cell in done]
            line["kl"] = [cell.measured.get("kl", {}).get(stage) for cell in done]
            phases = [cell.measured["phases"].get(phase, {}) for cell in done]
            line["seconds"] = [phase.get("seconds") for phase in phases]
            line["resumed"] = any(phase.get("resumed", False) for phase in phases)
            line["peak_mib"] = [phase.get("peak_mib") for phase in phases]
            if done:
                first = done[0].measured
                line |= {"recipe": first["recipe"], "scope": SCOPES[first["scope"]], "images": first["images"]}
            remarks = [reason for cell, reason in zip(group, reasons, strict=True) if cell.reason]
            line["remark"] = "; ".join(remarks) if stage == "base" else ""
            lines.append(line)
    return lines


def near(cells: Sequence[Cell], points: float) -> list[Cell]:
    """Finds runs whose accuracy is close to that of another line at the same width.

    Args:
        cells: The cells.
        points: The largest difference, in points of top-1 accuracy.

    Returns:
        The cells of these runs.
    """
    values = [
        (cell, stage, cell.measured["accuracy"][stage]["top1"])
        for cell in cells
        if cell.done
        for stage in (("base",) if cell.search == "none" else ("base", "final"))
    ]
    found: list[Cell] = []
    for cell, stage, top1 in values:
        rivals = [
            other
            for rival, rival_stage, other in values
            if rival.bits == cell.bits and (rival.label, rival_stage) != (cell.label, stage)
        ]
        if any(abs(top1 - other) <= points for other in rivals) and cell not in found:
            found.append(cell)
    return found


def _spread(values: Sequence[float | None], digits: int) -> str:
    """The mean, with the least and the largest where there are several."""
    known = [value for value in values if value is not None]
    if not known:
        return ""
    mean = f"{statistics.fmean(known):.{digits}f}"
    return mean if len(known) == 1 else f"{mean} ({min(known):.{digits}f} to {max(known):.{digits}f})"


def _mean(values: Sequence[float | None], combine: Callable[[list[float]], float] = statistics.fmean) -> str:
    known = [value for value in values if value is not None]
    return f"{combine(known):.0f}" if known else ""


def _images(line: dict[str, Any]) -> str:
    counts = line.get("images")
    if counts is None:
        return ""
    if line["search"] == "none":
        return str(counts["base"])
    return f"{counts['search']} + {counts['held_out']} to pick a pass" if counts["held_out"] else str(counts["search"])


def markdown(lines: Sequence[dict[str, Any]]) -> str:
    """Formats the table as Markdown.

    Args:
        lines: The lines that `lines_of` returns.

    Returns:
        The table.
    """
    rows = []
    for line in lines:
        several = f" (seeds {', '.join(map(str, line['seeds']))})" if len(line["seeds"]) > 1 else ""
        seconds = _mean(line["seconds"])
        seconds = f"at least {seconds}" if seconds and line["resumed"] else seconds
        fields = (
            line["bits"],
            line["method"],
            line.get("recipe", ""),
            line.get("scope", ""),
            "" if line["search"] == "none" else f"+ {line['search']}",
            _spread(line["top1"], 2) + several,
            _spread(line["objective"], 4),
            _spread(line["kl"], 4),
            f"+ {seconds}" if seconds and line["search"] != "none" else seconds,
            _mean(line["peak_mib"], max),
            _images(line),
            line["remark"],
        )
        rows.append(fields)
    return rows_of(_HEADER, rows)


def rows_of(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Formats text as a Markdown table; line breaks are replaced and bars escaped.

    Args:
        header: The titles of the columns.
        rows: The fields of each row.

    Returns:
        The table.
    """
    lines = [" | ".join(" ".join(field.split()).replace("|", "\\|") for field in row) for row in [header, *rows]]
    lines = [f"| {line} |" for line in lines]
    return "\n".join([lines[0], "|" + "---|" * len(header), *lines[1:]]) + "\n"
