"""Turns photographs into model inputs: timm's evaluation transform on Pillow images, without torchvision."""

import math

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

from cptv_jax.errors import InputError
from cptv_jax.models.preprocessing import Preprocessing

_RESAMPLING = {
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
    "nearest": Image.Resampling.NEAREST,
}


def fit_short_side(width: int, height: int, short_side: int) -> tuple[int, int]:
    """Computes an image's size after its short side is resized; the long side is rounded down, as torchvision does.

    Args:
        width: Width before, in pixels.
        height: Height before, in pixels.
        short_side: The short side afterwards, in pixels.

    Returns:
        Width and height afterwards, in pixels.
    """
    if width <= height:
        return short_side, int(short_side * height / width)
    return int(short_side * width / height), short_side


def crop_start(length: int, size: int) -> int:
    """Computes where a centre crop starts; halves go to the even number, as in torchvision.

    Args:
        length: Length of the image's side, in pixels; at least `size`.
        size: Length of the crop's side, in pixels.

    Returns:
        The first pixel of the crop.
    """
    return round((length - size) / 2)


def padding(length: int, size: int) -> tuple[int, int]:
    """Computes how many zeros bring a side up to a size; an odd one goes after the image.

    Args:
        length: Length of the image's side, in pixels.
        size: The wanted length, in pixels.

    Returns:
        Zeros before and after the image.
    """
    missing = max(size - length, 0)
    return missing // 2, (missing + 1) // 2


def preprocess(image: Image.Image, preprocessing: Preprocessing) -> npt.NDArray[np.uint8]:
    """Turns a photograph into the model's input before normalization (timm's evaluation transform).

    Converts to RGB (alpha dropped, EXIF orientation ignored: both as timm does), resizes the short side to
    floor(size / crop_fraction), pads with black where it is still smaller, and crops the centre.

    Args:
        image: The photograph.
        preprocessing: The form that the model expects of its input.

    Returns:
        Pixels, uint8 [size, size, 3].

    Raises:
        InputError: For an unknown interpolation.
    """
    if preprocessing.interpolation not in _RESAMPLING:
        raise InputError(
            f"interpolation {preprocessing.interpolation!r} is unknown; choose one of {', '.join(_RESAMPLING)}."
        )
    size = preprocessing.image_size
    image = image.convert("RGB")
    target = fit_short_side(*image.size, math.floor(size / preprocessing.crop_fraction))
    image = image.resize(target, _RESAMPLING[preprocessing.interpolation])
    (left, right), (top, bottom) = (padding(length, size) for length in image.size)
    if left or top or right or bottom:
        image = ImageOps.expand(image, (left, top, right, bottom), fill=0)
    x, y = (crop_start(length, size) for length in image.size)
    return np.asarray(image.crop((x, y, x + size, y + size)))
