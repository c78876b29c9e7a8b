"""Base methods by name."""

from cptv_jax.calibration.observers import FITS, STATISTICS
from cptv_jax.methods import aiqvit, erq, fq_vit, ptq4vit, repq_vit
from cptv_jax.methods.base import Abilities, Method
from cptv_jax.reconstruction.training import ReconstructionConfig

METHODS: dict[str, Method] = {
    "fq-vit": Method(
        fq_vit.quantize,
        ("evol-q", "evol-q-omse", "fq-vit"),
        abilities=Abilities(FITS, FITS, STATISTICS),
    ),
    "omse": Method(  # the same calibration, of what matmuls read
        fq_vit.quantize,
        ("omse", "omse-log2"),
        abilities=Abilities(FITS, FITS, STATISTICS),
    ),
    "ptq4vit": Method(
        ptq4vit.quantize,
        ("ptq4vit", "base-ptq"),
        "ptq4vit",
        Abilities(tensors=("uniform", "twin-softmax", "twin-gelu"), observers=("method",)),
        first_images=True,
        couples_widths=True,
        check=ptq4vit.check,
    ),
    "repq-vit": Method(
        repq_vit.quantize,
        ("repq-vit",),
        "repq_vit",
        Abilities(tensors=("uniform", "log-sqrt2"), observers=("method",), asymmetric_only=True, grouped=()),
        first_images=True,
        rewrites_weights=True,
    ),
    "erq": Method(
        erq.quantize,
        ("erq", "erq-uniform"),
        "erq",
        Abilities(("uniform", "dual-uniform"), ("uniform", "log-sqrt2"), ("method",), asymmetric_only=True, grouped=()),
        rewrites_weights=True,
    ),
    "aiqvit": Method(
        aiqvit.quantize,
        ("aiqvit",),
        "aiqvit",
        Abilities(
            tensors=("uniform", "log-sqrt2", "focusing"),
            observers=("method",),
            asymmetric_only=True,
            low_rank=True,
            grouped=("focusing",),
        ),
        ReconstructionConfig(steps=60, easy_first=0.3),
        rewrites_weights=True,
        check=aiqvit.check,
    ),
}
