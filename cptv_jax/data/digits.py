"""scikit-learn's handwritten digits, enlarged to 32 x 32: real images that need no download."""

import numpy as np
import numpy.typing as npt

from cptv_jax.data.images import Images
from cptv_jax.errors import InputError

IMAGE_SIZE = 32
_SPLITS = {"train": slice(0, 1200), "calibration": slice(1200, 1500), "test": slice(1500, 1797)}


def load_digits(split: str) -> Images:
    """Loads a split of scikit-learn's 1,797 labelled digits, in its order.

    The 8 x 8 values, divided by 16, are enlarged bilinearly to 32 x 32 (corners not aligned), repeated for three
    channels, and normalized by mean and deviation 0.5.

    Args:
        split: "train" (1,200 images), "calibration" (300) or "test" (297).

    Returns:
        Images with float32 pixels [N, 32, 32, 3] in [-1, 1].

    Raises:
        InputError: For another split.
    """
    if split not in _SPLITS:
        raise InputError(f"the digits have no split {split!r}; choose one of {', '.join(_SPLITS)}.")
    from sklearn.datasets import load_digits as sklearn_digits  # takes longer to import than jax

    where = _SPLITS[split]
    bunch = sklearn_digits()
    small = (bunch.images[where] / 16).astype(np.float32)
    enlarge = bilinear_weights(small.shape[1], IMAGE_SIZE)
    grey = (enlarge @ small @ enlarge.T - np.float32(0.5)) / np.float32(0.5)
    return Images(
        pixels=np.repeat(grey[..., None], 3, axis=3),
        labels=bunch.target[where].astype(np.int32),
        names=tuple(f"digit {i}" for i in range(where.start, where.stop)),
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
    )


def bilinear_weights(size: int, new_size: int) -> npt.NDArray[np.float32]:
    """Computes the matrix that enlarges one axis bilinearly, with pixel centres at i + 0.5.

    Args:
        size: Length of the axis.
        new_size: Length after enlarging.

    Returns:
        Weights, float32 [new_size, size]; rows sum to 1.
    """
    centres = (np.arange(new_size) + 0.5) * size / new_size - 0.5
    centres = np.clip(centres, 0, size - 1)  # beyond the outer centres the edge pixel is repeated
    return np.maximum(0, 1 - np.abs(centres[:, None] - np.arange(size))).astype(np.float32)
