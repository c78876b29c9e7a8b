"""Plots as PNG files, written whole or not at all."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    pass
from collections.abc import Iterator
from contextlib import contextmanager


def plot_proposals(path: Path, log: tuple[dict[str, Any], ...]) -> None:
    """What proposals minimized, batch after batch, as a PNG; each point is a mean over some batches."""
    with plotted(path, (7, 4)) as axes:
        begin = 0
        for record in (record for record in log if record.get("batch_losses")):
            end = begin + len(record["batch_losses"])
            axes.plot(range(begin, end), record["batch_losses"], label=f"pass {record['pass']}")
            begin = end
        axes.set(xlabel="groups of optimizer steps", ylabel="mean loss of a batch")


def plot_losses(path: Path, log: tuple[dict[str, Any], ...]) -> None:
    """The objective after every accepted step, with the passes and their held-out losses, as a PNG."""
    steps = [record for record in log if record["event"] in ("start", "accepted")]
    position, marks = 0, []
    for record in log:
        position += record["event"] == "accepted"
        if record.get("held_out") is not None:
            marks.append((position, record["held_out"]))
    with plotted(path, (7, 4)) as axes:
        axes.step(range(len(steps)), [record["loss"] for record in steps], where="post", label="search images")
        if marks:
            axes.plot(*zip(*marks, strict=True), "o--", color="tab:orange", label="held-out images, after each pass")
        axes.set(xlabel="accepted steps", ylabel="objective")


@contextmanager
def plotted(path: Path, size: tuple[float, float]) -> Iterator[Any]:
    """Axes to draw on, of a figure of so many inches, which is saved with a legend when the block ends."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot  # takes a second to import

    figure, axes = pyplot.subplots(figsize=size, layout="constrained")
    yield axes
    axes.legend()
    temporary = path.with_name(f".{path.name}.tmp")
    figure.savefig(temporary, dpi=110, format="png")
    pyplot.close(figure)
    temporary.replace(path)
