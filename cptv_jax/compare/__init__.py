"""Parity with published PyTorch code: recompute what a recorded file holds, and say how far we are off."""

from collections.abc import Callable, Iterable
from pathlib import Path

from cptv_jax.compare import losses
from cptv_jax.compare.checks import Check
from cptv_jax.compare.interchange import Recording, read_recording
from cptv_jax.compare.losses import compare_losses
from cptv_jax.compare.quantized import compare_quantized
from cptv_jax.compare.report import Comparison, render
from cptv_jax.compare.search import compare_search
from cptv_jax.recipe import OBSERVERS

__all__ = ["Check", "Comparison", "compare_file", "render", "run"]

_KINDS: dict[str, Callable[[Recording], list[Check]]] = {
    "quantized": compare_quantized,
    "search": compare_search,
    "losses": compare_losses,
}
_NOTES = {
    "quantized": ("observer states (obs_min, obs_max) and traces repeat what scales and blocks show: not compared",),
    "losses": losses.NOTES,
}


def compare_file(path: str | Path) -> Comparison:
    """Recomputes everything that a file of the interchange format holds and compares.

    Weights and data are looked up beside the file. Raises InputError when the file cannot be compared.
    """
    recording = read_recording(Path(path))
    checks = _KINDS[recording.kind](recording)
    return Comparison(str(path), _title(recording), tuple(checks), _NOTES.get(recording.kind, ()))


def run(paths: Iterable[str | Path], write: Callable[[str], None] = print) -> int:
    """Compares each file and writes its report; exit code 0, or 1 when any file is beyond tolerance."""
    passed = True
    for path in paths:
        comparison = compare_file(path)
        write(render(comparison))
        passed = passed and comparison.passed
    return 0 if passed else 1


def _title(recording: Recording) -> str:
    """The run in a line."""
    if recording.kind == "losses":
        return f"{recording.reference}, losses"
    meta = recording.meta
    bits = " ".join(f"{name} {meta.integer(f'bits.{name}')}" for name in ("weights", "activations", "softmax"))
    observers = f"{meta.choice('observer.weights', OBSERVERS)}/{meta.choice('observer.activations', OBSERVERS)}"
    options = ("ptf", "integer_layer_norm", "log_int_softmax", "bias_correction", "quantize_input")
    active = ", ".join(name for name in options if meta.flag(name))
    return f"{recording.reference}, {recording.kind}; bits: {bits}; observers: {observers}; {active}"
