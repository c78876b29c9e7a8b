"""Base methods: each makes a first quantized model from a float one and calibration images."""

from collections.abc import Callable
from dataclasses import dataclass

from cptv_jax.methods import fq_vit
from cptv_jax.quantized import QuantizedModel


@dataclass(frozen=True)
class Method:
    """A base method.

    quantize: (model, calibration batches, recipe, key, on_progress=..., [options=...]) -> quantized model.
    presets: the recipes that it can carry out; the first is its own.
    options: the field of QuantizeConfig with its options, if it has any.
    """

    quantize: Callable[..., QuantizedModel]
    presets: tuple[str, ...]
    options: str | None = None


METHODS: dict[str, Method] = {
    "fq-vit": Method(fq_vit.quantize, ("evol-q", "evol-q-omse", "fq-vit")),
}
