"""Parity with published PyTorch code: recomputes the content of a recorded file and reports how far it is off."""

from collections.abc import Callable, Iterable
from pathlib import Path

from cptv_jax.compare import losses
from cptv_jax.compare.checks import Check
from cptv_jax.compare.erq import compare_erq
from cptv_jax.compare.interchange import Recording, read_recording
from cptv_jax.compare.losses import compare_losses
from cptv_jax.compare.ptq4vit import compare_ptq4vit
from cptv_jax.compare.quantized import compare_quantized
from cptv_jax.compare.report import Comparison, render
from cptv_jax.compare.repq_vit import compare_repq_vit
from cptv_jax.compare.search import compare_search
from cptv_jax.recipe.spec import OBSERVER_RULES

__all__ = ["Check", "Comparison", "compare_file", "render", "run"]

Compare = Callable[[Recording], list[Check]]

# By kind and reference, the function that compares such a file. A new reference adds a line.
_COMPARE: dict[str, dict[str, Compare]] = {
    "quantized": {
        "evol-q": compare_quantized,
        "fq-vit": compare_quantized,
        "ptq4vit": compare_ptq4vit,
        "repq-vit": compare_repq_vit,
        "erq": compare_erq,
    },
    "search": {"evol-q": compare_search},
    "losses": {"evol-q": compare_losses},
}
_NOTES = {
    "quantized": ("observer states and traces repeat what scales and blocks show: not compared",),
    "losses": losses.NOTES,
}


def compare_file(path: str | Path) -> Comparison:
    """Recomputes everything that a file of the interchange format holds, and compares.

    Args:
        path: The file; weights and data are looked up next to it.

    Returns:
        The comparison.

    Raises:
        InputError: If the file cannot be compared.
    """
    recording = read_recording(Path(path), {kind: tuple(known) for kind, known in _COMPARE.items()})
    checks = _COMPARE[recording.kind][recording.reference](recording)
    return Comparison(str(path), _describe_run(recording), tuple(checks), _NOTES.get(recording.kind, ()))


def run(paths: Iterable[str | Path], write: Callable[[str], None] = print) -> int:
    """Compares each file and writes its report.

    Args:
        paths: The files.
        write: Takes each report.

    Returns:
        The exit code: 0, or 1 if any file is beyond tolerance.
    """
    passed = True
    for path in paths:
        comparison = compare_file(path)
        write(render(comparison))
        passed = passed and comparison.passed
    return 0 if passed else 1


def _describe_run(recording: Recording) -> str:
    """Returns a one-line description of the run that a file records."""
    if recording.kind == "losses":
        return f"{recording.reference}, losses"
    meta = recording.meta
    if recording.reference not in ("evol-q", "fq-vit"):
        bits = " ".join(f"{name} {meta.integer(f'bits.{name}')}" for name in ("weights", "activations"))
        return f"{recording.reference}, {recording.kind}; bits: {bits}"
    bits = " ".join(f"{name} {meta.integer(f'bits.{name}')}" for name in ("weights", "activations", "softmax"))
    observers = "/".join(meta.choice(f"observer.{kind}", tuple(OBSERVER_RULES)) for kind in ("weights", "activations"))
    options = ("ptf", "integer_layer_norm", "log_int_softmax", "bias_correction", "quantize_input")
    active = ", ".join(name for name in options if meta.flag(name))
    return f"{recording.reference}, {recording.kind}; bits: {bits}; observers: {observers}; {active}"
