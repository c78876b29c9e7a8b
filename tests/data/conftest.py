"""What the data tests share: small photographs made on the spot."""

from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from cptv_jax.models.preprocessing import Preprocessing

SIZE = 16


@pytest.fixture
def small() -> Preprocessing:
    """A model input small enough for many images."""
    return Preprocessing(image_size=SIZE, crop_fraction=1.0)


@pytest.fixture
def paint() -> Callable[..., Path]:
    """Writes an image of one grey value, lossless for PNG, and makes the folders on the way."""

    def write(path: Path, value: int = 0, size: tuple[int, int] = (SIZE, SIZE)) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", size, (value, value, value)).save(path)
        return path

    return write
