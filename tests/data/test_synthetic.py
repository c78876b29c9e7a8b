"""Generated calibration images: seeded, of the model's size, and of the kind they are called."""

import numpy as np
import pytest

from cptv_jax.data import load
from cptv_jax.data.synthetic import KINDS
from cptv_jax.errors import InputError
from cptv_jax.models.preprocessing import Preprocessing

SMALL = Preprocessing(image_size=32)


def pixels(kind: str, seed: int = 0, limit: int = 6) -> np.ndarray:
    return load(f"synthetic:{kind}", SMALL, labels=False, limit=limit, seed=seed).pixels


@pytest.mark.parametrize("kind", KINDS)
def test_images_have_the_models_size_and_no_labels(kind: str) -> None:
    images = load(f"synthetic:{kind}", SMALL, labels=False, limit=5, need=5)
    assert images.pixels.shape == (5, 32, 32, 3) and images.pixels.dtype == np.uint8
    assert images.labels is None and len(set(images.names)) == 5
    assert images.normalize(0, 5).dtype == np.float32


@pytest.mark.parametrize("kind", KINDS)
def test_a_seed_decides_all_pixels_and_fewer_images_are_the_first_of_more(kind: str) -> None:
    np.testing.assert_array_equal(pixels(kind, 1), pixels(kind, 1))
    np.testing.assert_array_equal(pixels(kind, 1, 3), pixels(kind, 1)[:3])
    assert not np.array_equal(pixels(kind, 1), pixels(kind, 2))
    assert all(not np.array_equal(a, b) for a, b in zip(pixels(kind)[1:], pixels(kind)[:-1], strict=True))


def neighbours(images: np.ndarray) -> float:
    """Correlation of a pixel with the one beside it."""
    left, right = images[:, :, :-1].astype(float).ravel(), images[:, :, 1:].astype(float).ravel()
    return float(np.corrcoef(left, right)[0, 1])


def test_textures_have_structure_and_noise_has_none() -> None:
    assert abs(neighbours(pixels("noise", limit=50))) < 0.02
    assert neighbours(pixels("textures", limit=50)) > 0.5


def test_what_cannot_be_generated_is_refused() -> None:
    with pytest.raises(InputError, match="called 'texture'; did you mean 'textures'"):
        load("synthetic:texture", SMALL, labels=False)
    with pytest.raises(InputError, match="has no labels"):
        load("synthetic:noise", SMALL, labels=True)
    with pytest.raises(InputError, match="4 synthetic images are needed"):
        load("synthetic:noise", SMALL, labels=False, limit=3, need=4)
