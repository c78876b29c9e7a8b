"""The choice of a source's images: one seeded rule for all sources."""

import numpy as np
import numpy.typing as npt

from cptv_jax.errors import InputError


def choose(available: int, *, limit: int | None, need: int, seed: int, source: str) -> npt.NDArray[np.intp]:
    """Chooses which images of a source are used, and in which order.

    Without a limit all images are used, in the source's order. With a limit they are the first of a permutation, so
    that a smaller limit is a prefix of a larger one and every slice mixes the classes.

    Args:
        available: How many images the source has.
        limit: How many to take at most; None takes all.
        need: Fewer than this are an error.
        seed: Seed of the permutation.
        source: The source's name in messages.

    Returns:
        Positions [count], all different, from 0 to available - 1.

    Raises:
        InputError: If fewer images remain than are needed, or the limit is below 1.
    """
    if limit is not None and limit < 1:
        raise InputError(f"limit is {limit}; ask for at least 1 image, or leave it out to take all.")
    if available < need:
        raise InputError(f"{source} holds {available} images but {need} are needed; add images or ask for fewer.")
    if limit is None:
        return np.arange(available)
    if limit < need:
        raise InputError(f"limit is {limit} but {need} images of {source} are needed; raise the limit.")
    return np.random.default_rng(seed).permutation(available)[:limit]
