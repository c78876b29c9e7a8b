from pathlib import Path

import numpy as np
import pytest

from cptv_jax.data import load_digits
from cptv_jax.data.digits import bilinear_weights
from cptv_jax.errors import InputError


def test_digits_equal_the_recorded_arrays(golden: Path) -> None:
    recorded = np.load(golden / "data.npz")
    calibration, test = load_digits("calibration"), load_digits("test")
    for images, name in [(calibration.take(slice(0, 96)), "calib"), (test, "test")]:
        expected = recorded[f"{name}_images"].transpose(0, 2, 3, 1)
        np.testing.assert_allclose(images.normalize(0, len(images)), expected, rtol=0, atol=1e-6)
        np.testing.assert_array_equal(images.labels, recorded[f"{name}_labels"])


def test_splits_are_disjoint_and_cover_the_set() -> None:
    splits = [load_digits(name) for name in ("train", "calibration", "test")]
    assert [len(split) for split in splits] == [1200, 300, 297]
    assert len({name for split in splits for name in split.names}) == 1797
    for split in splits:
        assert split.pixels.dtype == np.float32
        assert split.pixels.shape[1:] == (32, 32, 3)


def test_an_unknown_split_is_refused() -> None:
    with pytest.raises(InputError, match=r"'val'.*train, calibration, test"):
        load_digits("val")


@pytest.mark.parametrize("size", [1, 2, 8])
def test_enlarging_keeps_constants_and_straight_lines_inside(size: int) -> None:
    weights = bilinear_weights(size, 4 * size)
    np.testing.assert_allclose(weights.sum(axis=1), 1, atol=1e-6)
    line = weights @ (np.arange(size) + 0.5)
    centres = np.clip((np.arange(4 * size) + 0.5) / 4, 0.5, size - 0.5)
    np.testing.assert_allclose(line, centres, atol=1e-6)
