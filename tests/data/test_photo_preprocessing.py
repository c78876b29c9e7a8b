from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from cptv_jax.data.preprocessing import crop_start, fit_short_side, padding, preprocess
from cptv_jax.errors import InputError
from cptv_jax.models.preprocessing import Preprocessing

sides = st.integers(1, 5000)


def test_pixels_equal_timms_evaluation_transform(shared: Path) -> None:
    recorded = np.load(shared / "golden" / "deit_tiny_float.npz")
    for file, expected in zip(recorded["files"], recorded["pixels"], strict=True):
        with Image.open(shared / "data" / str(file)) as photo:
            np.testing.assert_array_equal(preprocess(photo, Preprocessing()), expected, err_msg=str(file))


@given(sides, sides, st.integers(1, 600))
def test_resizing_sets_the_short_side_and_floors_the_long_one(width: int, height: int, short: int) -> None:
    new = fit_short_side(width, height, short)
    assert min(new) == short
    assert max(new) == short * max(width, height) // min(width, height)
    assert (new[0] < new[1]) <= (width < height)


@given(sides, sides)
def test_the_crop_lies_inside_and_its_start_rounds_to_even(size: int, extra: int) -> None:
    start = crop_start(size + extra, size)
    assert 0 <= start <= extra
    assert abs(2 * start - extra) <= 1
    assert extra % 2 == 0 or start % 2 == 0


@given(sides, sides)
def test_padding_fills_exactly_what_is_missing_with_the_odd_pixel_after(length: int, size: int) -> None:
    before, after = padding(length, size)
    assert length + before + after == max(length, size)
    assert after - before in (0, 1)


def test_a_crop_larger_than_the_resized_image_is_padded_with_black() -> None:
    pixels = preprocess(Image.new("RGB", (10, 30), "white"), Preprocessing(image_size=9, crop_fraction=1.5))
    white = pixels.min(axis=(0, 2)) == 255
    np.testing.assert_array_equal(white, [0, 1, 1, 1, 1, 1, 1, 0, 0])  # 6 columns remain: 1 before, 2 after


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "1", "LA"])
def test_every_colour_mode_becomes_three_channels(mode: str) -> None:
    pixels = preprocess(Image.new("RGB", (20, 20), "white").convert(mode), Preprocessing(image_size=8))
    assert pixels.shape == (8, 8, 3)
    assert pixels.dtype == np.uint8
    assert pixels.min() >= 254


def test_interpolations_differ_and_an_unknown_one_is_refused() -> None:
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 3), np.uint8))
    results = {
        name: preprocess(photo, Preprocessing(image_size=8, interpolation=name)).tobytes()
        for name in ("bicubic", "bilinear", "nearest")
    }
    assert len(set(results.values())) == 3
    with pytest.raises(InputError, match=r"'cubic'.*bicubic, bilinear, nearest"):
        preprocess(photo, Preprocessing(interpolation="cubic"))
