"""Base methods: each makes a first quantized model from a float one and calibration images."""

from collections.abc import Callable

from cptv_jax.methods import fq_vit
from cptv_jax.quantized import QuantizedModel

# (model, calibration batches, recipe, key, on_progress) -> quantized model
BaseMethod = Callable[..., QuantizedModel]

METHODS: dict[str, BaseMethod] = {"fq-vit": fq_vit.quantize}
