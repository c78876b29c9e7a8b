"""RepQ-ViT (arXiv 2212.08254): percentile search, and scale reparameterization of LayerNorm activations."""

from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar

from jaxtyping import Array, Float
from pydantic import Field

from cptv_jax.calibration.first_pass import find_reparameterizable, first_images, initialize, reparameterize
from cptv_jax.calibration.percentile import fit_weight
from cptv_jax.options import options
from cptv_jax.quantized.model import Model, QuantizedModel
from cptv_jax.quantizers import Quantizer
from cptv_jax.recipe.sites import weight_site
from cptv_jax.recipe.spec import Recipe


@options
class RepqVitOptions:
    """RepQ-ViT: percentile search, and scale reparameterization of LayerNorm activations."""

    name: ClassVar[str] = "repq-vit"
    images: int = Field(default=32, ge=1)
    """How many calibration images, the first ones, quantizers are fitted on; memory holds the tensors of one stage for
    all of them."""
    round_zero_point: bool = False
    """Round the zero points that reparameterization makes, for integer deployment; the published code does not."""


def quantize(
    model: Model,
    batches: Sequence[Float[Array, "_batch height width channels"]],
    recipe: Recipe,
    key: Array,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
    options: RepqVitOptions = RepqVitOptions(),  # noqa: B008
) -> QuantizedModel:
    """Quantizes everything that linear layers and matmuls read; rewrites LayerNorms and the layers that read them.

    Args:
        model: The float model.
        batches: Normalised calibration images.
        recipe: What is quantized, and how.
        key: Unused; nothing here is random.
        on_progress: Called as on_progress(done, total), which count stages.
        options: The options.

    Returns:
        The quantized model.
    """
    del key
    total = len(model.architecture.stage_names)
    done = iter(range(1, total + 1))
    images = first_images(batches, options.images)
    channel_wise = find_reparameterizable(model, recipe)
    quantizers = initialize(model, images, recipe, channel_wise, True, lambda: on_progress(next(done), total))
    return finish(model, recipe, quantizers, options)


def finish(
    model: Model, recipe: Recipe, quantizers: Mapping[str, Quantizer], options: RepqVitOptions
) -> QuantizedModel:
    """Reparameterizes the model that `initialize` has fitted quantizers for: the second of RepQ-ViT's two steps.

    Args:
        model: The float model.
        recipe: What is quantized, and how.
        quantizers: What `initialize` returned.
        options: The options.

    Returns:
        The quantized model.
    """
    pairs = find_reparameterizable(model, recipe)
    model, changed = reparameterize(model, quantizers, pairs, options.round_zero_point)
    # The published code repeats its calibration here, and only these quantizers are not initialized by then.
    weights = {weight_site(layer): layer for readers in pairs.values() for layer in readers}
    refitted = {
        site: fit_weight(recipe.sites[site], model.layer(layer)["kernel"])
        for site, layer in weights.items()
        if site in recipe.sites
    }
    final = {**quantizers, **changed, **refitted}
    return QuantizedModel(model, recipe, {site: final[site] for site in recipe.sites})
