"""Plots as PNG files, written whole or not at all."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


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
