"""Progress bars on stderr, with time left."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm


@contextmanager
def bar(description: str, total: int, enabled: bool, initial: int = 0) -> Iterator[Any]:
    """A tqdm bar that counts to `total`; silent when not enabled."""
    with tqdm(total=total, initial=initial, desc=description, disable=not enabled, dynamic_ncols=True) as shown:
        yield shown


def counter(shown: Any) -> Callable[[int, int], None]:
    """An on_progress(done, total) callback that drives a bar."""

    def update(done: int, total: int) -> None:
        shown.total = total
        shown.update(done - shown.n)

    return update
