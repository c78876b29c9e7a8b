"""Images held in memory: the form in which every source hands pixels to the rest of the package."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from cptv_jax.errors import InputError
from cptv_jax.models.preprocessing import Preprocessing


@dataclass(frozen=True, eq=False)
class Images:
    """Model inputs held in memory: preprocessed pixels, with labels if they are known.

    Attributes:
        pixels: [N, H, W, C], uint8 (still to be normalized by mean and std) or float32 (already normalized).
        labels: Class indices, int32 [N], or None if they are unknown or were not asked for.
        names: Where each image came from [N]; only messages use them.
        mean: The mean of each channel of pixels scaled to [0, 1].
        std: The deviation of each channel of pixels scaled to [0, 1].

    Example:
        >>> images = from_arrays(np.zeros((10, 224, 224, 3), np.uint8), preprocessing=Preprocessing())
        >>> images.take(slice(0, 4)).normalize(0, 2).shape
        (2, 224, 224, 3)
    """

    pixels: npt.NDArray[Any]
    labels: npt.NDArray[np.int32] | None
    names: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __len__(self) -> int:
        return len(self.pixels)

    def normalize(self, start: int, stop: int) -> npt.NDArray[np.float32]:
        """Normalizes some of the images, as the model reads them; float pixels are returned as they are.

        The order is pixels / 255, minus mean, over std, every step rounded to float32: torchvision computes exactly
        this, and fusing the steps would change last bits.

        Args:
            start: Position of the first image.
            stop: Position after the last image.

        Returns:
            Pixels, float32 [stop - start, H, W, C].
        """
        pixels = self.pixels[start:stop]
        if pixels.dtype == np.float32:
            return pixels
        values = pixels.astype(np.float32)
        values /= np.float32(255)
        values -= np.asarray(self.mean, np.float32)
        values /= np.asarray(self.std, np.float32)
        return values

    def take(self, indices: slice | Sequence[int] | npt.NDArray[np.integer]) -> "Images":
        """Selects the images at some positions, in their order; a slice shares memory with this object.

        Args:
            indices: A slice, or positions.

        Returns:
            The images.
        """
        where = indices if isinstance(indices, slice) else np.asarray(indices, dtype=np.intp)
        chosen = range(len(self))[where] if isinstance(where, slice) else where
        return replace(
            self,
            pixels=self.pixels[where],
            labels=None if self.labels is None else self.labels[where],
            names=tuple(self.names[i] for i in chosen),
        )

    def mirror(self) -> "Images":
        """Returns the same images with left and right exchanged."""
        return replace(self, pixels=self.pixels[:, :, ::-1])

    def without_labels(self) -> "Images":
        """Returns the same images without labels, as calibration and search receive them."""
        return replace(self, labels=None)

    def require_labels(self) -> npt.NDArray[np.int32]:
        """Returns the labels.

        Returns:
            Class indices, int32 [N].

        Raises:
            InputError: If there are none.
        """
        if self.labels is None:
            first = f" (the first is {self.names[0]})" if self.names else ""
            raise InputError(f"these {len(self)} images have no labels{first}; accuracy needs a labelled source.")
        return self.labels


def from_arrays(images: Any, labels: Any = None, *, preprocessing: Preprocessing | None = None) -> Images:
    """Makes images from arrays that are already resized and cropped.

    Args:
        images: [N, H, W, C] with 1 or 3 channels, uint8 (needs `preprocessing`, for mean and std) or float32 (already
            normalized, finite).
        labels: Class indices [N], integers from 0 on, or None.
        preprocessing: The form that the model expects of its input; if it is given, sizes are checked against it.

    Returns:
        The images; arrays are not copied.

    Raises:
        InputError: For any other rank, type, shape or value.

    Example:
        >>> pixels = np.zeros((2, 224, 224, 3), np.uint8)
        >>> len(from_arrays(pixels, [3, 7], preprocessing=Preprocessing()))
        2
    """
    pixels = np.asarray(images)
    if pixels.ndim != 4:
        raise InputError(f"images have shape {pixels.shape}; pass a 4-dimensional array [N, height, width, channels].")
    if len(pixels) == 0:
        raise InputError("images hold no image (the first dimension is 0); pass at least one.")
    channels = pixels.shape[3]
    if channels not in (1, 3):
        hint = "; transpose NCHW arrays with .transpose(0, 2, 3, 1)" if pixels.shape[1] in (1, 3) else ""
        raise InputError(f"images have shape {pixels.shape}, with {channels} channels last; pass 1 or 3{hint}.")
    if pixels.dtype not in (np.uint8, np.float32):
        raise InputError(
            f"images have dtype {pixels.dtype}; pass uint8 (0..255) or float32 (already normalised), "
            "for instance with .astype(np.float32)."
        )
    if pixels.dtype == np.float32:
        _check_finite(pixels)
    elif preprocessing is None:
        raise InputError(
            "uint8 images need the model's mean and std; pass preprocessing=, or normalised float32 images."
        )
    if preprocessing is not None:
        _check_fits(pixels.shape, preprocessing)
    count = len(pixels)
    return Images(
        pixels=pixels,
        labels=None if labels is None else _check_labels(labels, count),
        names=tuple(f"image {i}" for i in range(count)),
        mean=(0.0,) * channels if preprocessing is None else preprocessing.mean,
        std=(1.0,) * channels if preprocessing is None else preprocessing.std,
    )


def _check_finite(pixels: npt.NDArray[Any]) -> None:
    for index, image in enumerate(pixels):  # one at a time: a mask of all pixels would double the memory
        if not np.isfinite(image).all():
            raise InputError(f"image {index} holds NaN or infinite values; remove or repair it.")


def _check_fits(shape: tuple[int, ...], preprocessing: Preprocessing) -> None:
    size, channels = preprocessing.image_size, len(preprocessing.mean)
    if shape[1:] != (size, size, channels):
        raise InputError(
            f"images have shape {shape}, but the model expects [N, {size}, {size}, {channels}]; "
            "resize and crop them first."
        )


def _check_labels(labels: Any, count: int) -> npt.NDArray[np.int32]:
    array = np.asarray(labels)
    if array.shape != (count,):
        raise InputError(f"labels have shape {array.shape} for {count} images; pass one integer per image, [{count}].")
    if array.dtype.kind not in "iu":
        raise InputError(f"labels have dtype {array.dtype}; pass integer class indices.")
    bad = np.flatnonzero((array < 0) | (array > np.iinfo(np.int32).max))
    if bad.size:
        raise InputError(f"label {bad[0]} is {array[bad[0]]}; class indices are at least 0 and fit 32 bits.")
    return array.astype(np.int32)
