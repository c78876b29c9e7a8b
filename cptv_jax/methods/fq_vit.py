"""FQ-ViT's calibration (arXiv 2111.13824), which Evol-Q also starts from: statistics of a float forward pass."""

from collections.abc import Callable, Sequence
from typing import ClassVar

from jaxtyping import Array, Float

from cptv_jax.calibration.statistics import calibrate
from cptv_jax.options import options
from cptv_jax.quantized.model import Model, QuantizedModel
from cptv_jax.recipe.spec import Recipe


@options
class FqVitOptions:
    """FQ-ViT: statistics of a float forward pass, for the whole network."""

    name: ClassVar[str] = "fq-vit"


@options
class OmseOptions:
    """OMSE: the calibration of FQ-ViT for everything that linear layers and matmuls read."""

    name: ClassVar[str] = "omse"


def quantize(
    model: Model,
    batches: Sequence[Float[Array, "_batch height width channels"]],
    recipe: Recipe,
    key: Array,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
    options: FqVitOptions | OmseOptions = FqVitOptions(),  # noqa: B008
) -> QuantizedModel:
    """Quantizes every site of the recipe; weights stay as they are.

    Args:
        model: The float model.
        batches: Normalised calibration images; statistics that are scored see only the last batch.
        recipe: What is quantized, and how.
        key: Unused; nothing here is random.
        on_progress: Called as on_progress(done, total) after each piece of work.
        options: Unused; there are none.

    Returns:
        The quantized model.
    """
    del key, options
    return QuantizedModel(model, recipe, calibrate(model, batches, recipe, on_progress))
