"""Base methods: each makes a first quantized model from a float one and calibration images."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from cptv_jax.errors import InputError
from cptv_jax.methods import aiqvit, erq, fq_vit, ptq4vit, repq_vit
from cptv_jax.methods.abilities import Abilities
from cptv_jax.methods.learning import NO_RECONSTRUCTION, ReconstructionConfig
from cptv_jax.models.architecture import Architecture
from cptv_jax.quantized import Model, QuantizedModel
from cptv_jax.recipe import ObserverName, Recipe


@dataclass(frozen=True)
class Method:
    """A base method.

    carry_out: (float model, calibration batches, recipe, key, on_progress=..., [options=...]) -> quantized model.
    presets: the recipes that are its own to carry out; the first is the default.
    options: the field of QuantizeConfig with its options, if it has any.
    abilities: what recipes may say; null means anything.
    first_images: it reads the first calibration images alone, as many as its options say.
    rewrites_weights: the quantized model has other weights than the float one.
    couples_widths: the scales of one site depend on the widths of others.
    check: (architecture, recipe, options) raises InputError for what is wrong beside that.
    reconstruction: what null fields of QuantizeConfig's reconstruction mean.
    """

    carry_out: Callable[..., QuantizedModel]
    presets: tuple[str, ...]
    options: str | None = None
    abilities: Abilities | None = None
    reconstruction: ReconstructionConfig = NO_RECONSTRUCTION
    first_images: bool = False
    rewrites_weights: bool = False
    couples_widths: bool = False
    check: Callable[[Architecture, Recipe, Any], None] = lambda architecture, recipe, options: None

    def quantize(self, model: Model | QuantizedModel, *arguments: Any, **options: Any) -> QuantizedModel:
        """`carry_out`, on a float model only. Raises InputError for a quantized one."""
        return self.carry_out(require_float(model), *arguments, **options)


def require_float(model: Model | QuantizedModel) -> Model:
    """The model itself. Raises InputError where it is quantized: every base method starts from float weights."""
    if isinstance(model, QuantizedModel):
        raise InputError(
            f"the model is quantized already (recipe {model.recipe.name}); give the float model that it was made from"
        )
    return model


_STATISTICS: tuple[ObserverName, ...] = ("minmax", "ema", "percentile", "omse", "ptf")
METHODS: dict[str, Method] = {
    "fq-vit": Method(
        fq_vit.quantize,
        ("evol-q", "evol-q-omse", "fq-vit"),
        abilities=Abilities(tensors=("uniform", "log2"), observers=_STATISTICS),
    ),
    "omse": Method(  # the same calibration, of what matmuls read
        fq_vit.quantize,
        ("omse", "omse-log2"),
        abilities=Abilities(tensors=("uniform", "log2"), observers=_STATISTICS),
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
