"""FQ-ViT's calibration (arXiv 2111.13824), which is also Evol-Q's base: statistics of a float forward pass."""

from collections.abc import Callable, Sequence

from jaxtyping import Array, Float

from cptv_jax.calibration.statistics import calibrate
from cptv_jax.quantized.model import Model, QuantizedModel
from cptv_jax.recipe.spec import Recipe


def quantize(
    model: Model,
    batches: Sequence[Float[Array, "batch height width channels"]],
    recipe: Recipe,
    key: Array,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> QuantizedModel:
    """Quantizes every site of the recipe; weights stay as they are.

    batches: normalised calibration images; statistics that are scored see only the last one. key: unused, nothing
    here is random. on_progress(done, total) counts pieces of work.
    """
    del key
    return QuantizedModel(model, recipe, calibrate(model, batches, recipe, on_progress))
