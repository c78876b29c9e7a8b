import re
from typing import Any

import numpy as np
import pytest

from cptv_jax.data import from_arrays
from cptv_jax.errors import InputError
from cptv_jax.models.preprocessing import Preprocessing

PREPROCESSING = Preprocessing(image_size=16)
PIXELS = np.random.default_rng(0).integers(0, 256, (5, 16, 16, 3), np.uint8)
FLOATS = PIXELS.astype(np.float32)


def test_normalising_rounds_each_step_to_float32() -> None:
    every_value = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, axis=3)
    got = from_arrays(every_value, preprocessing=PREPROCESSING).normalize(0, 1).reshape(256, 3)
    for value in range(256):
        for channel in range(3):
            mean, std = np.float32(PREPROCESSING.mean[channel]), np.float32(PREPROCESSING.std[channel])
            assert got[value, channel] == (np.float32(value) / np.float32(255) - mean) / std
    in_double = (np.arange(256)[:, None] / 255 - np.array(PREPROCESSING.mean)) / np.array(PREPROCESSING.std)
    assert (got != in_double.astype(np.float32)).any(), "the case cannot tell the order of rounding"


def test_normalising_a_range_leaves_the_pixels_alone_and_floats_as_they_are() -> None:
    images = from_arrays(PIXELS, preprocessing=PREPROCESSING)
    before = PIXELS.copy()
    np.testing.assert_array_equal(images.normalize(2, 4), images.normalize(0, 5)[2:4])
    np.testing.assert_array_equal(images.pixels, before)
    assert images.normalize(0, 5).dtype == np.float32
    np.testing.assert_array_equal(from_arrays(FLOATS).normalize(1, 3), FLOATS[1:3])


def test_take_keeps_pixels_labels_and_names_together() -> None:
    images = from_arrays(PIXELS, [10, 11, 12, 13, 14], preprocessing=PREPROCESSING)
    for where in (np.array([3, 1]), [3, 1], slice(3, 0, -2)):
        taken = images.take(where)
        np.testing.assert_array_equal(taken.pixels, PIXELS[[3, 1]])
        np.testing.assert_array_equal(taken.labels, [13, 11])
        assert taken.names == ("image 3", "image 1")
    assert len(images.take([])) == 0


def test_a_mirrored_image_has_left_and_right_exchanged() -> None:
    images = from_arrays(PIXELS, preprocessing=PREPROCESSING)
    np.testing.assert_array_equal(images.mirror().normalize(1, 2)[0], images.normalize(1, 2)[0, :, ::-1])
    np.testing.assert_array_equal(images.pixels, PIXELS)
    np.testing.assert_array_equal(images.mirror().mirror().pixels, PIXELS)


def test_labels_can_be_dropped_and_their_lack_is_said() -> None:
    images = from_arrays(PIXELS, [0, 1, 2, 3, 4], preprocessing=PREPROCESSING)
    assert images.require_labels().dtype == np.int32
    with pytest.raises(InputError, match="no labels"):
        images.without_labels().require_labels()
    assert images.labels is not None


NAN, INFINITE = FLOATS.copy(), FLOATS.copy()
NAN[2:, 0, 0, 0] = np.nan
INFINITE[4, 3, 2, 1] = -np.inf


@pytest.mark.parametrize(
    ("images", "labels", "said"),
    [
        (PIXELS[0], None, "shape (16, 16, 3)"),
        (PIXELS[:0], None, "no image"),
        (PIXELS.transpose(0, 3, 1, 2), None, "transpose"),
        (PIXELS[..., :2], None, "2 channels"),
        (PIXELS[..., :1], None, "[N, 16, 16, 3]"),
        (PIXELS[:, :8], None, "[N, 16, 16, 3]"),
        (FLOATS.astype(np.float64), None, "float64"),
        (PIXELS.astype(np.int32), None, "int32"),
        (NAN, None, "image 2 "),
        (INFINITE, None, "image 4 "),
        (PIXELS, [0, 1], "(2,) for 5 images"),
        (PIXELS, [[0], [1], [2], [3], [4]], "(5, 1)"),
        (PIXELS, [0.0, 1.0, 2.0, 3.0, 4.0], "float64"),
        (PIXELS, [True] * 5, "bool"),
        (PIXELS, [0, 1, -1, 3, -4], "label 2 is -1"),
        (PIXELS, [0, 1, 2, 3, 2**31], "label 4 is 2147483648"),
    ],
)
def test_wrong_arrays_are_refused_in_one_sentence(images: np.ndarray, labels: Any, said: str) -> None:
    with pytest.raises(InputError, match=re.escape(said)) as raised:
        from_arrays(images, labels, preprocessing=PREPROCESSING)
    assert "\n" not in str(raised.value)
    assert str(raised.value).endswith(".")


def test_raw_pixels_without_mean_and_std_are_refused() -> None:
    with pytest.raises(InputError, match="preprocessing="):
        from_arrays(PIXELS)
