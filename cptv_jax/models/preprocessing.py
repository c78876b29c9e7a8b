"""What an architecture expects of its input images."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Preprocessing:
    """How a photograph becomes a model input (timm's evaluation transform).

    image_size: side of the square input, in pixels.
    crop_fraction: the short side is resized to floor(image_size / crop_fraction), then the centre is cropped.
    interpolation: "bicubic", "bilinear" or "nearest", through Pillow.
    mean, std: per channel, of pixels scaled to [0, 1].
    """

    image_size: int = 224
    crop_fraction: float = 0.9
    interpolation: str = "bicubic"
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
