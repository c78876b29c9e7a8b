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
    """How many calibration images, the first ones, quantizers are fitted on; memory holds what one stage computes for
    all of them."""
    round_zero_point: bool = False
    """Round the zero points that reparameterization makes, for integer deployment; the published code does not."""


def quantize(
    model: Model,
    batches: Sequence[Float[Array, "batch height width channels"]],
    recipe: Recipe,
    key: Array,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
    options: RepqVitOptions = RepqVitOptions(),  # noqa: B008
) -> QuantizedModel:
    """Quantizes what linear layers and matmuls read; LayerNorms and the layers behind them are rewritten.

    batches: normalised calibration images. key: unused, nothing here is random. on_progress(done, total) counts stages.

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
    """Reparameterizes what `initialize` left: the second of RepQ-ViT's two steps."""
    pairs = find_reparameterizable(model, recipe)
    model, changed = reparameterize(model, quantizers, pairs, options.round_zero_point)
    # The published code runs its calibration once more here, in which only these are not yet initialized.
    weights = {weight_site(layer): layer for readers in pairs.values() for layer in readers}
    refitted = {
        site: fit_weight(recipe.sites[site], model.layer(layer)["kernel"])
        for site, layer in weights.items()
        if site in recipe.sites
    }
    final = {**quantizers, **changed, **refitted}
    return QuantizedModel(model, recipe, {site: final[site] for site in recipe.sites})
