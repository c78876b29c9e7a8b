"""The only file that mentions devices."""

import jax


def default_chunk(batch: int) -> tuple[int, int]:
    """Images and candidates to compute at once on the present backend.

    On a CPU small chunks stay in its caches: ten images at a time run 1.6 times as fast as a hundred.
    """
    if jax.default_backend() == "cpu":
        return min(batch, 10), 1
    return batch, 8
