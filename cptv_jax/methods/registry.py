"""Base methods by name."""

from cptv_jax.calibration.observers import FITS, STATISTICS
from cptv_jax.methods import aiqvit, erq, fq_vit, ptq4vit, repq_vit
from cptv_jax.methods.base import Abilities, Method
from cptv_jax.reconstruction.config import ReconstructionConfig
from cptv_jax.registry import Registry

METHODS: Registry[Method] = Registry("base method")


def register_method(method: Method) -> Method:
    """Makes a base method known to configurations, the command line and the benches.

    Args:
        method: The method; its name is that of its class of options.

    Returns:
        The method.

    Raises:
        InputError: Another method has this name.

    Example:
        >>> register_method(Method(CoarseOptions, quantize_coarsely, presets=("omse",)))
        >>> quantize(model, images, QuantizeConfig(method=CoarseOptions(stretch=1.1)))
    """
    return METHODS.register(method.name, method)


register_method(
    Method(
        fq_vit.FqVitOptions,
        fq_vit.quantize,
        ("evol-q", "evol-q-omse", "fq-vit"),
        Abilities(FITS, FITS, STATISTICS),
    )
)
register_method(
    Method(
        fq_vit.OmseOptions,
        fq_vit.quantize,
        ("omse", "omse-log2"),
        Abilities(FITS, FITS, STATISTICS),
    )
)
register_method(
    Method(
        ptq4vit.Ptq4VitOptions,
        ptq4vit.quantize,
        ("ptq4vit", "base-ptq"),
        Abilities(tensors=("uniform", "twin-softmax", "twin-gelu"), observers=("method",)),
        first_images=True,
        couples_widths=True,
        check=ptq4vit.check,
    )
)
register_method(
    Method(
        repq_vit.RepqVitOptions,
        repq_vit.quantize,
        ("repq-vit",),
        Abilities(tensors=("uniform", "log-sqrt2"), observers=("method",), asymmetric_only=True, grouped=()),
        first_images=True,
        rewrites_weights=True,
    )
)
register_method(
    Method(
        erq.ErqOptions,
        erq.quantize,
        ("erq", "erq-uniform"),
        Abilities(("uniform", "dual-uniform"), ("uniform", "log-sqrt2"), ("method",), asymmetric_only=True, grouped=()),
        rewrites_weights=True,
    )
)
register_method(
    Method(
        aiqvit.AiqvitOptions,
        aiqvit.quantize,
        ("aiqvit",),
        Abilities(
            tensors=("uniform", "log-sqrt2", "focusing"),
            observers=("method",),
            asymmetric_only=True,
            low_rank=True,
            grouped=("focusing",),
        ),
        ReconstructionConfig(steps=60, easy_first=0.3),
        rewrites_weights=True,
    )
)
