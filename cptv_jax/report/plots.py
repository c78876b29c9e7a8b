"""Plots as PNG files, written whole or not at all."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cptv_jax.search.events import Accepted, Log, PassEnd, Proposed, Start


def plot_proposals(path: Path, log: Log) -> None:
    """Plots the losses that proposals minimized, in the order of the batches.

    Args:
        path: The PNG file to write; each point is a mean over several batches.
        log: The log of the search.
    """
    with plotted(path, (7, 4)) as axes:
        begin = 0
        for event in log:
            if isinstance(event, Proposed) and event.batch_losses:
                end = begin + len(event.batch_losses)
                axes.plot(range(begin, end), event.batch_losses, label=f"pass {event.number}")
                begin = end
        axes.set(xlabel="groups of optimizer steps", ylabel="mean loss of a batch")


def plot_losses(path: Path, log: Log) -> None:
    """Plots the objective after every accepted step, with the passes and their held-out losses.

    Args:
        path: The PNG file to write.
        log: The log of the search.
    """
    losses = [event.loss for event in log if isinstance(event, Start | Accepted)]
    position, marks = 0, []
    for event in log:
        position += isinstance(event, Accepted)
        if isinstance(event, Start | PassEnd) and event.held_out is not None:
            marks.append((position, event.held_out))
    with plotted(path, (7, 4)) as axes:
        axes.step(range(len(losses)), losses, where="post", label="search images")
        if marks:
            axes.plot(*zip(*marks, strict=True), "o--", color="tab:orange", label="held-out images, after each pass")
        axes.set(xlabel="accepted steps", ylabel="objective")


@contextmanager
def plotted(path: Path, size: tuple[float, float]) -> Iterator[Any]:
    """Opens a figure to draw on, and saves it with a legend when the block ends.

    Args:
        path: The PNG file to write.
        size: Width and height of the figure, in inches.

    Yields:
        The axes.
    """
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
