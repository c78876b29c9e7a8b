"""Images that show nothing: calibration data of another kind than the training data."""

import numpy as np
import numpy.typing as npt

from cptv_jax.data.images import Images
from cptv_jax.errors import InputError, did_you_mean
from cptv_jax.models.preprocessing import Preprocessing

COUNT = 1000  # images that a source has if no limit is given
_FLATTEST, _STEEPEST = 0.5, 1.75  # exponents of a texture's spectrum; photographs have about 1


def _noise(rng: np.random.Generator, size: int, channels: int) -> npt.NDArray[np.uint8]:
    """Returns independent uniform pixels."""
    return rng.integers(0, 256, (size, size, channels), np.uint8)


def _texture(rng: np.random.Generator, size: int, channels: int) -> npt.NDArray[np.uint8]:
    """Returns random phases under a power law's amplitudes, stretched along one direction, in correlated colours."""
    angle, stretch = rng.uniform(0, np.pi), rng.uniform(1, 4)
    y, x = np.meshgrid(np.fft.fftfreq(size), np.fft.rfftfreq(size), indexing="ij")
    along, across = x * np.cos(angle) + y * np.sin(angle), stretch * (y * np.cos(angle) - x * np.sin(angle))
    frequency = np.hypot(along, across)
    frequency[0, 0] = np.inf  # the mean is set below
    amplitude = frequency ** -rng.uniform(_FLATTEST, _STEEPEST)
    phases = rng.normal(size=(channels, *frequency.shape)) + 1j * rng.normal(size=(channels, *frequency.shape))
    layers = np.fft.irfft2(amplitude * phases, (size, size))
    layers /= layers.std(axis=(1, 2), keepdims=True)
    mixing = rng.normal(size=(channels, channels)) / np.sqrt(channels)
    values = np.einsum("dc,cij->ijd", mixing, layers) * rng.uniform(20, 70) + rng.uniform(60, 195, channels)
    return np.clip(np.round(values), 0, 255).astype(np.uint8)


KINDS = {"noise": _noise, "textures": _texture}


def load_synthetic(
    kind: str, preprocessing: Preprocessing, *, limit: int | None = None, need: int = 1, seed: int = 0
) -> Images:
    """Generates images without labels. The same seed gives the same images, and fewer are the first of more.

    Args:
        kind: "noise" (independent uniform pixels) or "textures" (random phases under a power law's amplitudes).
        preprocessing: The form that the model expects of its input.
        limit: How many images; None makes 1,000, or the number needed if that is more.
        need: A limit below this is an error.
        seed: Seed of the images.

    Returns:
        Images with uint8 pixels [N, size, size, channels].

    Raises:
        InputError: For another kind, or a limit below the number needed.
    """
    if kind not in KINDS:
        raise InputError(f"there are no synthetic images called '{kind}'{did_you_mean(kind, KINDS)}")
    count = max(COUNT, need) if limit is None else limit
    if count < max(need, 1):
        raise InputError(f"limit is {count} but {max(need, 1)} synthetic images are needed; raise the limit.")
    shape = preprocessing.image_size, len(preprocessing.mean)
    return Images(
        np.stack([KINDS[kind](np.random.default_rng((seed, index)), *shape) for index in range(count)]),
        None,
        tuple(f"synthetic {kind} {index}" for index in range(count)),
        preprocessing.mean,
        preprocessing.std,
    )
