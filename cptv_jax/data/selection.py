"""Which images of a source are used: one seeded rule for all sources."""

import numpy as np
import numpy.typing as npt

from cptv_jax.errors import InputError


def choose(available: int, *, limit: int | None, need: int, seed: int, source: str) -> npt.NDArray[np.intp]:
    """Positions of the images to use, in the order to use them: [count] integers in 0..available-1, all different.

    Without a limit, all in the source's order. With one, the first `limit` of a permutation drawn from `seed`, so that
    a smaller limit is a prefix of a larger one and every slice mixes the classes; a limit above `available` takes all.
    Raises InputError when fewer than `need` remain; `source` names the source in the message.
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
