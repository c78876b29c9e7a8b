"""Comparisons as values and as text."""

from dataclasses import dataclass

from cptv_jax.compare.checks import Check


@dataclass(frozen=True)
class Comparison:
    """The result of comparing one file.

    Attributes:
        path: The file.
        title: A one-line description of the run that it records.
        checks: The checks, in the order of the steps.
        notes: The parts of the file that were not compared.
    """

    path: str
    title: str
    checks: tuple[Check, ...]
    notes: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether every check passed."""
        return all(check.passed for check in self.checks)


def render(comparison: Comparison) -> str:
    """Renders a comparison as text: a block of rows for each step, then the verdict line.

    Args:
        comparison: The comparison.

    Returns:
        Several lines.
    """
    lines = [f"{comparison.path}: {comparison.title}"]
    group = ""
    for check in comparison.checks:
        if check.group != group:
            group = check.group
            lines.append(f"  {group}")
        lines.append("    " + _row(check))
    lines += [f"  note: {note}" for note in comparison.notes]
    judged = [check for check in comparison.checks if check.allowed is not None]
    failed = [check for check in judged if not check.passed]
    if failed:
        names = ", ".join(f"{check.group.split(',')[0]}: {check.name}" for check in failed[:3])
        more = f" and {len(failed) - 3} more" if len(failed) > 3 else ""
        lines.append(f"FAIL {comparison.path}: {len(failed)} of {len(judged)} checks beyond tolerance ({names}{more})")
    else:
        lines.append(f"PASS {comparison.path}: {len(judged)} checks within tolerance")
    return "\n".join(lines)


def _row(check: Check) -> str:
    parts = [f"{check.name:<36}"]
    if check.largest is not None:
        parts.append(f"largest {check.largest:<9.3g}")
    if check.equal is not None:
        parts.append(f"equal {_percent(check.equal)}")
    if check.allowed is not None:
        number = _percent if check.share else _number
        verdict = "ok" if check.passed else "BEYOND TOLERANCE"
        parts.append(f"{number(check.measured)} {check.unit} (allowed {number(check.allowed)})  {verdict}")
    if check.remark:
        parts.append(f"[{check.remark}]")
    return "  ".join(parts).rstrip()


def _number(value: float) -> str:
    return f"{value:.3g}"


def _percent(value: float) -> str:
    return f"{100 * value:.3f}%"
