"""Progress bars on stderr, with time left."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm


@contextmanager
def bar(description: str, total: int, enabled: bool, initial: int = 0) -> Iterator[Any]:
    """Shows a tqdm bar on stderr.

    Args:
        description: Its label.
        total: The count that it ends at.
        enabled: False shows nothing.
        initial: The count that it starts from.

    Yields:
        The bar; `update(n)` counts.
    """
    with tqdm(total=total, initial=initial, desc=description, disable=not enabled, dynamic_ncols=True) as shown:
        yield shown


def counter(shown: Any) -> Callable[[int, int], None]:
    """Makes a callback that drives a bar.

    Args:
        shown: The bar.

    Returns:
        A function on_progress(done, total), called with the count so far and the count to reach.
    """

    def update(done: int, total: int) -> None:
        shown.total = total
        shown.update(done - shown.n)

    return update
