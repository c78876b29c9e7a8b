"""The form in which an architecture expects its input images."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Preprocessing:
    """How a photograph becomes a model input (timm's evaluation transform).

    Attributes:
        image_size: Side of the square input, in pixels.
        crop_fraction: The short side is resized to floor(image_size / crop_fraction), then the centre is cropped.
        interpolation: "bicubic", "bilinear" or "nearest", through Pillow.
        mean: The mean of each channel, of pixels scaled to [0, 1].
        std: The standard deviation of each channel, of pixels scaled to [0, 1].

    Example:
        >>> Preprocessing(image_size=384, crop_fraction=1.0, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)).image_size
        384
    """

    image_size: int = 224
    crop_fraction: float = 0.9
    interpolation: str = "bicubic"
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
