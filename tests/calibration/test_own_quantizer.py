"""A quantizer and an observer that a user writes outside the package, fitted by the statistics-based methods."""

import sys
from dataclasses import dataclass, replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import Array, Float
from tiny_vit import TINY

from cptv_jax import (
    InputError,
    Model,
    QuantizedModel,
    RecipeConfig,
    forward,
    images_from_arrays,
    load_config,
    load_model,
    quantize,
    register_fit,
    register_observer,
    register_quantizer,
    resolve,
    save_model,
)
from cptv_jax.calibration.observers import FITS, Range, Statistic
from cptv_jax.cli.main import main
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


register_quantizer("SquaresOfATest", Squares)
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


YAML = """
method: omse
recipe:
  overrides: {"*.softmax": {quantizer: squares-of-a-test, observer: minmax, bits: 3}}
calibration: {images: 8, batch: 4}
search:
  strategy: {name: generational, passes: 1, rounds: 2, children: 4, sigma: 0.3}
  space: {sites: ["*.softmax"]}
"""


def test_it_is_quantized_searched_saved_loaded_and_reported(model: Model, tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text(YAML)
    pixels = np.random.default_rng(0).integers(0, 256, (8, 32, 32, 3)).astype(np.uint8)
    given = images_from_arrays(pixels, preprocessing=TINY.preprocessing)
    outcome = quantize(model, given, load_config(str(tmp_path / "own.yaml")), out=tmp_path / "run")
    base, final = (m.quantizers["blocks.0.attn.softmax"] for m in (outcome.base, outcome.model))
    assert isinstance(base, Squares) and isinstance(final, Squares)
    assert outcome.log[-1].event == "pass" and "squares-of-a-test" in (tmp_path / "run" / "report.md").read_text()
    loaded = load_model(str(tmp_path / "run"))
    assert isinstance(loaded, QuantizedModel)
    assert isinstance(loaded.quantizers["blocks.0.attn.softmax"], Squares)
    np.testing.assert_array_equal(
        forward(loaded.stages(), given.normalize(0, 4)).logits,
        forward(outcome.model.stages(), given.normalize(0, 4)).logits,
    )


PLUGIN = """
from dataclasses import dataclass
import jax, jax.numpy as jnp
from cptv_jax import register_fit, register_quantizer
from cptv_jax.quantizers import ScaledQuantizer

@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Halves(ScaledQuantizer):
    scale: jax.Array
    high: jax.Array
    def codes(self, values):
        return jnp.clip(jnp.round(values / self.scale), 0, self.high)
    def values(self, codes):
        return codes * self.scale

register_quantizer("HalvesOfATest", Halves)
register_fit("halves-of-a-test", lambda spec, found, x: Halves(found.maximum / 3, jnp.float32(3)))
"""


def test_the_command_line_imports_the_module_that_registers_it(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CPTV_PLUGINS", "")  # put back after the test
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "halves_of_a_test.py").write_text(PLUGIN)
    save_model(tmp_path / "tiny", model)
    run = [
        "quantize",
        "tiny",
        "--images",
        "synthetic:noise",
        "--calibration.images",
        "4",
        "--calibration.batch",
        "4",
        "--search.strategy",
        "none",
    ]
    override = ["--recipe.overrides", "{'*.softmax': {quantizer: halves-of-a-test}}"]
    for plugin, code in (("no_such_module", 2), ("halves_of_a_test", 0)):
        with pytest.raises(SystemExit) as ended:
            main([*run, *override, "--plugin", plugin, "--out", "run"])
        assert ended.value.code == code, capsys.readouterr().err
    assert "no_such_module" in capsys.readouterr().err
    loaded = load_model("run")
    assert isinstance(loaded, QuantizedModel)
    assert type(loaded.quantizers["blocks.0.attn.softmax"]).__name__ == "Halves"


def test_a_user_s_observer_sets_a_uniform_grid(model: Model, batch: Array) -> None:
    config = RecipeConfig(preset="omse", overrides={"embed.input": {"observer": "half-of-a-test"}})
    found = METHODS["omse"].quantize(model, [batch / 2, batch], resolve(config, sites_of(TINY)), jax.random.key(0))
    quantizer = found.quantizers["embed.input"]
    assert isinstance(quantizer, Uniform) and quantizer.zero_point == 0
    np.testing.assert_allclose(quantizer.scale, np.max(batch) / 2 / 255, rtol=2e-7)  # two float32 divisions


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
