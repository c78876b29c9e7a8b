"""Known models: timm names, sizes, preprocessing, and where their weights live."""

from cptv_jax.errors import InputError, did_you_mean
from cptv_jax.models.architecture import Architecture
from cptv_jax.models.preprocessing import Preprocessing
from cptv_jax.models.vit import ViTConfig
from cptv_jax.models.vit_family import VIT

_IMAGENET = Preprocessing()
_AUGREG = Preprocessing(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))  # crop 0.9, as timm's augreg ViTs

_SIZES = {"tiny": (192, 12, 3), "small": (384, 12, 6), "base": (768, 12, 12), "large": (1024, 24, 16)}


def _vit(name: str, size: str, preprocessing: Preprocessing, distilled: bool = False) -> Architecture:
    width, depth, heads = _SIZES[size]
    return Architecture(name, VIT, ViTConfig(width=width, depth=depth, heads=heads, distilled=distilled), preprocessing)


ZOO: dict[str, Architecture] = {
    architecture.name: architecture
    for architecture in (
        *(_vit(f"deit_{size}_patch16_224", size, _IMAGENET) for size in ("tiny", "small", "base")),
        *(
            _vit(f"deit_{size}_distilled_patch16_224", size, _IMAGENET, distilled=True)
            for size in ("tiny", "small", "base")
        ),
        *(_vit(f"vit_{size}_patch16_224", size, _AUGREG) for size in ("tiny", "small", "base", "large")),
    )
}


def architecture_named(name: str) -> Architecture:
    """Finds the architecture of a timm name.

    Args:
        name: As timm writes it; a pretraining tag such as `.fb_in1k` is ignored.

    Returns:
        The architecture of the zoo.

    Raises:
        InputError: For a name that is not in the zoo, with the nearest that is.

    Example:
        >>> architecture_named("deit_tiny_patch16_224").config.depth
        12
    """
    plain = name.split(".", 1)[0]
    if plain not in ZOO:
        raise InputError(f"unknown architecture '{name}'{did_you_mean(plain, ZOO)}")
    return ZOO[plain]


def guess_architecture(source: str) -> Architecture:
    """Guesses the architecture from a file name or hub id that contains its name; the longest such name wins.

    The tensors alone would not do: they do not tell DeiT from ViT, whose preprocessing differs.

    Args:
        source: The file name or hub id.

    Returns:
        The architecture of the zoo.

    Raises:
        InputError: If no name fits.
    """
    matches = [name for name in ZOO if name in source]
    if not matches:
        raise InputError(f"cannot tell the architecture of '{source}'; name it with --arch (one of {', '.join(ZOO)})")
    return ZOO[max(matches, key=len)]
