"""A quantizer and an observer that a user writes outside the package, fitted by the statistics-based methods."""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import Array, Float
from tiny_vit import TINY

from cptv_jax import InputError, Model, RecipeConfig, forward, resolve
from cptv_jax.calibration.observers import FITS, Range, Statistic, register_fit, register_observer
from cptv_jax.methods.registry import METHODS
from cptv_jax.models.architecture import sites_of
from cptv_jax.quantizers import Quantizer, Uniform
from cptv_jax.quantizers.base import ScaledQuantizer
from cptv_jax.recipe.spec import SiteSpec


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Squares(ScaledQuantizer):
    """Levels scale * code^2: close together near zero, where most of an attention map lies."""

    scale: Float[Array, "..."]
    high: Float[Array, ""]

    def codes(self, values: Float[Array, "..."]) -> Float[Array, "..."]:
        return jnp.clip(jnp.round(jnp.sqrt(jnp.maximum(values, 0) / self.scale)), 0, self.high)

    def values(self, codes: Float[Array, "..."]) -> Float[Array, "..."]:
        return codes**2 * self.scale


def fit_squares(spec: SiteSpec, found: Range, x: Array) -> Quantizer:
    high = jnp.float32(2.0**spec.bits - 1)
    return Squares(found.maximum / high**2, high)


def half(found: Range, x: Array, spec: SiteSpec) -> Uniform:
    high = jnp.float32(2.0**spec.bits - 1)
    return Uniform(found.maximum / 2 / high, jnp.float32(0), jnp.float32(0), high)


register_fit("squares-of-a-test", fit_squares, attention_only=True)
register_observer("half-of-a-test", Statistic(fit=half), per_channel=False)
CHANGE = {"quantizer": "squares-of-a-test"}


@pytest.fixture(scope="module")
def model() -> Model:
    return Model(TINY, TINY.initialize(0))


@pytest.fixture(scope="module")
def batch() -> Array:
    return jnp.asarray(np.random.default_rng(0).normal(size=(2, 32, 32, 3)), jnp.float32)


@pytest.mark.parametrize("method, preset", [("fq-vit", "evol-q"), ("omse", "omse")])
def test_a_method_of_statistics_fits_a_user_s_quantizer(method: str, preset: str, model: Model, batch: Array) -> None:
    config = RecipeConfig(preset=preset, softmax_bits=3, overrides={"*.softmax": CHANGE})
    recipe = resolve(config, sites_of(TINY))
    abilities = METHODS[method].abilities
    assert abilities is not None
    abilities.check(method, recipe)
    quantized = METHODS[method].quantize(model, [batch], recipe, jax.random.key(0))
    found = quantized.quantizers["blocks.0.attn.softmax"]
    assert isinstance(found, Squares) and found.high == 7
    assert 0 < float(found.scale) * 49 <= 1  # the largest probability
    assert np.isfinite(forward(quantized.stages(), batch).logits).all()


def test_a_user_s_observer_sets_a_uniform_grid(model: Model, batch: Array) -> None:
    change = {"observer": "half-of-a-test"}
    recipes = [
        resolve(RecipeConfig(preset="omse", overrides={"*.softmax": each}), sites_of(TINY))
        for each in (change, {"observer": "minmax"})
    ]
    ours, whole = (
        METHODS["omse"].quantize(model, [batch], recipe, jax.random.key(0)).quantizers["blocks.0.attn.softmax"]
        for recipe in recipes
    )
    assert isinstance(whole, Uniform)
    # A map's smallest probability is near, but not, zero: min-max spreads the grid from there.
    np.testing.assert_allclose(ours.scale, whole.scale / 2, rtol=0.5)
    assert float(ours.scale) < float(whole.scale)


def test_rules_of_a_user_s_names_are_checked() -> None:
    with pytest.raises(InputError, match="a squares-of-a-test quantizer is for attention maps"):
        resolve(RecipeConfig(overrides={"*.norm1": CHANGE}), sites_of(TINY))
    with pytest.raises(InputError, match="observer 'half-of-a-test' works per tensor"):
        resolve(RecipeConfig(weight_observer="half-of-a-test"), sites_of(TINY))
    with pytest.raises(InputError, match="unknown quantizer 'squares-of-a-tes'; did you mean 'squares-of-a-test'"):
        resolve(RecipeConfig(overrides={"*.softmax": {"quantizer": "squares-of-a-tes"}}), sites_of(TINY))


def test_a_name_keeps_its_meaning() -> None:
    register_fit("squares-of-a-test", fit_squares)  # the same again, as when a notebook cell is run twice
    with pytest.raises(InputError, match="'squares-of-a-test' already"):
        register_fit("squares-of-a-test", lambda spec, found, x: fit_squares(spec, found, x))
    with pytest.raises(InputError, match="there is a quantizer 'focusing' already"):
        register_fit("focusing", fit_squares)
    assert "focusing" not in FITS
    with pytest.raises(InputError, match="observer 'method' already"):
        register_observer("method", Statistic())


def test_other_methods_say_what_they_fit() -> None:
    recipe = resolve(RecipeConfig(preset="repq-vit"), sites_of(TINY))
    softmax = "blocks.0.attn.softmax"
    recipe = replace(
        recipe, sites={**recipe.sites, softmax: replace(recipe.sites[softmax], quantizer="squares-of-a-test")}
    )
    abilities = METHODS["repq-vit"].abilities
    assert abilities is not None
    with pytest.raises(InputError, match="method repq-vit fits no squares-of-a-test quantizer here"):
        abilities.check("repq-vit", recipe)
