"""Quantizers fitted on the fly, and LayerNorms that take over the scales of their channels."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_vit import SMALL, images, recipe_of, small_model

from cptv_jax.calibration.first_pass import find_reparameterizable, first_images, initialize, reparameterize
from cptv_jax.calibration.percentile import fit
from cptv_jax.models.architecture import sites_of
from cptv_jax.quantized.model import Model, QuantizedModel
from cptv_jax.quantizers import FractionalUniform, OffsetUniform
from cptv_jax.recipe.sites import Site, layer_norm_readers
from cptv_jax.runtime.forward import forward, stage_inputs

PAIRS = {
    f"blocks.{i}.{norm}": (f"blocks.{i}.{layer}",)
    for i in range(3)
    for norm, layer in (("norm1", "attn.qkv"), ("norm2", "mlp.fc1"))
}


def test_layer_norms_inside_blocks_are_paired_with_what_reads_them(golden: Path) -> None:
    recipe = recipe_of(preset="repq-vit")
    assert find_reparameterizable(small_model(golden), recipe) == PAIRS
    left = recipe_of(preset="repq-vit", overrides={"blocks.0.norm1": None, "blocks.1.norm2": {"per_channel": True}})
    assert set(PAIRS) - set(find_reparameterizable(small_model(golden), left)) == {"blocks.0.norm1", "blocks.1.norm2"}


def test_a_layer_norm_of_other_channels_or_read_by_a_matmul_is_left_alone() -> None:
    def norm(name: str) -> Site:
        return Site("blocks", name, "layer_norm", (1, 4, 8))

    def weight(layer: str, inputs: int, outputs: int, reads: str, stage: str = "blocks") -> Site:
        return Site(stage, layer, "weight", (inputs, outputs), (reads,))

    sites = (
        norm("a"), weight("one", 8, 3, "blocks.a"), weight("two", 8, 5, "blocks.a"),
        norm("b"), weight("patches", 32, 3, "blocks.b"),
        norm("c"), weight("three", 8, 3, "blocks.c"),
        Site("blocks", "product", "matmul", (1, 4, 4), ("blocks.c", "blocks.c")),
        Site("head", "norm", "layer_norm", (1, 4, 8)), weight("fc", 8, 10, "head.norm", "head"),
    )  # fmt: skip
    assert layer_norm_readers(sites) == {"blocks.a": ("blocks.one.weight", "blocks.two.weight")}


def normalized(model: Model, norm: str, x: jax.Array) -> jax.Array:
    """LayerNorm by its definition."""
    affine = model.layer(norm)
    centred = x - x.mean(-1, keepdims=True)
    return centred / jnp.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6) * affine["weight"] + affine["bias"]


@pytest.mark.slow
def test_every_quantizer_is_fitted_on_what_its_quantized_predecessors_give(golden: Path) -> None:
    model, x, recipe = small_model(golden), jnp.asarray(images(golden)[:8]), recipe_of(preset="repq-vit", weight_bits=4)
    quantizers = initialize(model, x, recipe, {}, weights=True)
    assert set(quantizers) == set(recipe.sites)
    inputs = stage_inputs(QuantizedModel(model, recipe, quantizers).stages(), x)
    unquantized = stage_inputs(model.stages(), x)
    for block in (0, 2):
        norm = f"blocks.{block}.norm1"
        found = [
            fit(recipe.sites[norm], normalized(model, norm, some[block + 1].values)).scale
            for some in (inputs, unquantized)
        ]
        np.testing.assert_allclose(quantizers[norm].scale, found[0], rtol=1e-5)
        assert abs(float(found[1] / found[0]) - 1) > 1e-3
    again = initialize(model, x, recipe, {}, weights=True, inputs={"blocks.2": inputs[3]})
    np.testing.assert_allclose(again["blocks.2.mlp.gelu"].scale, quantizers["blocks.2.mlp.gelu"].scale, rtol=1e-5)
    other = initialize(
        model, x, recipe, {}, weights=True, inputs={"blocks.2": jax.tree.map(lambda a: 2 * a, inputs[3])}
    )
    assert other["blocks.1.mlp.gelu"].scale == quantizers["blocks.1.mlp.gelu"].scale
    assert other["head.norm"].scale != quantizers["head.norm"].scale


@pytest.mark.slow
def test_weights_stay_float_where_only_activations_are_initialized(golden: Path) -> None:
    recipe = recipe_of(preset="erq")
    quantizers = initialize(small_model(golden), jnp.asarray(images(golden)[:4]), recipe, PAIRS, weights=False)
    assert set(quantizers) == {site for site in recipe.sites if not site.endswith(".weight")}
    assert {site for site, quantizer in quantizers.items() if quantizer.scale.ndim} == set(PAIRS)


@pytest.mark.slow
@pytest.mark.parametrize("rounded", [False, True])
def test_reparameterization_changes_no_float_output_and_no_code(golden: Path, rounded: bool) -> None:
    model, x = small_model(golden), jnp.asarray(images(golden)[:8])
    recipe = recipe_of(preset="repq-vit", activation_bits=4)
    before = initialize(model, x, recipe, PAIRS, weights=False)
    after, changed = reparameterize(model, before, PAIRS, rounded)
    assert set(changed) == set(PAIRS)
    np.testing.assert_allclose(forward(after.stages(), x).logits, forward(model.stages(), x).logits, atol=2e-5)
    for norm, quantizer in changed.items():
        old = before[norm]
        assert isinstance(old, OffsetUniform)
        assert type(quantizer) is (OffsetUniform if rounded else FractionalUniform)
        assert quantizer.scale.shape == quantizer.zero_point.shape == ()
        assert float(quantizer.zero_point).is_integer() == rounded
        # A value of the old LayerNorm and the new one's have the same position in the range, in steps.
        y = jnp.asarray(np.random.default_rng(0).normal(size=(50, 64)), jnp.float32)
        affine, moved = model.layer(norm), after.layer(norm)
        old_position = (y * affine["weight"] + affine["bias"]) / old.scale + old.zero_point
        new_position = (y * moved["weight"] + moved["bias"]) / quantizer.scale + quantizer.zero_point
        np.testing.assert_allclose(new_position, old_position, atol=2e-4)


@pytest.mark.slow
def test_a_constant_channel_behind_a_layer_norm_stays_finite(golden: Path) -> None:
    # DeiT-Tiny has two LayerNorm weights that are exactly zero.
    model, x = small_model(golden), jnp.asarray(images(golden)[:8])
    affine = model.layer("blocks.1.norm1")
    for bias in (0.0, 0.3, -0.3):
        zeroed = {"weight": affine["weight"].at[5].set(0), "bias": affine["bias"].at[5].set(bias)}
        degenerate = model.with_layers({"blocks.1.norm1": zeroed})
        quantizers = initialize(degenerate, x, recipe_of(preset="repq-vit"), PAIRS, weights=True)
        after, _ = reparameterize(degenerate, quantizers, PAIRS)
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(after.weights))
        expected = forward(degenerate.stages(), x).logits
        np.testing.assert_allclose(forward(after.stages(), x).logits, expected, atol=5e-5)


def test_the_first_images_come_from_as_many_batches_as_it_takes() -> None:
    batches = [jnp.arange(i, i + 3.0).reshape(3, 1, 1, 1) for i in (0, 3, 6)]
    for count, expected in ((2, [0, 1]), (3, [0, 1, 2]), (5, [0, 1, 2, 3, 4]), (99, list(range(9)))):
        np.testing.assert_array_equal(first_images(batches, count).ravel(), expected)


@pytest.mark.slow
def test_spec_of_a_channel_wise_site_is_fitted_along_the_last_axis(golden: Path) -> None:
    recipe = recipe_of(preset="repq-vit")
    x = jnp.asarray(images(golden)[:2])
    quantizers = initialize(small_model(golden), x, recipe, {}, weights=True)
    np.testing.assert_array_equal(quantizers["embed.input"].scale, fit(recipe.sites["embed.input"], x).scale)
    assert [site.name for site in sites_of(SMALL) if site.kind == "layer_norm"] == [*PAIRS, "head.norm"]
