"""Decodes image files into one preallocated uint8 array, for every source that stores encoded images."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image
from tqdm import tqdm

from cptv_jax.data.preprocessing import preprocess
from cptv_jax.errors import InputError
from cptv_jax.models.preprocessing import Preprocessing

_THREADS = 2  # Pillow decodes and resizes outside the interpreter lock


def decode(file: Path | BytesIO, name: str) -> Image.Image:
    """Decodes an image file to RGB.

    Args:
        file: A path or bytes, opened by Pillow.
        name: The image's name in messages.

    Returns:
        The image in mode RGB.

    Raises:
        InputError: For a file that Pillow cannot read to the end.
    """
    try:
        with Image.open(file) as image:
            return image.convert("RGB")
    except Exception as error:  # Pillow's plugins raise almost any type on damaged data
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"{name} is not a readable image ({reason}); replace or remove it.") from error


def decode_all(
    names: Sequence[str],
    open_file: Callable[[int], Path | BytesIO],
    preprocessing: Preprocessing,
    *,
    progress: bool,
) -> npt.NDArray[np.uint8]:
    """Decodes and preprocesses every image; two decoded photographs are in memory in addition to the result.

    Args:
        names: The images' names in messages [N].
        open_file: Gives the path or bytes of image i; called once for each i, from two threads.
        preprocessing: The form that the model expects of its input.
        progress: Whether to show a progress bar.

    Returns:
        Pixels, uint8 [N, size, size, 3].

    Raises:
        InputError: For the first unreadable image. No further image is opened after it, or after an interrupt.
    """
    size = preprocessing.image_size
    pixels = np.empty((len(names), size, size, 3), np.uint8)

    def fill(index: int) -> None:
        pixels[index] = preprocess(decode(open_file(index), names[index]), preprocessing)

    pool = ThreadPoolExecutor(_THREADS)
    try:
        done = pool.map(fill, range(len(names)))
        for _ in tqdm(done, total=len(names), desc="images", unit="image", disable=not progress):
            pass
    finally:
        pool.shutdown(cancel_futures=True)  # leaving a `with` would decode the whole queue, even after Ctrl-C
    return pixels
