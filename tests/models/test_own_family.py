"""A model family that a user writes outside the package: an attention-free mixer, by public names alone."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from cptv_jax import (
    Architecture,
    CalibrationConfig,
    Generational,
    InputError,
    Model,
    Output,
    QuantizeConfig,
    QuantizedModel,
    RecipeConfig,
    SearchConfig,
    forward,
    images_from_arrays,
    load_model,
    quantize,
    resolve,
    save_model,
)
from cptv_jax.config.schema import JudgeConfig
from cptv_jax.interpreters import Operations, Tensor
from cptv_jax.models.architecture import sites_of
from cptv_jax.models.family import Family, register_family
from cptv_jax.models.layers import LayerNorm, Linear
from cptv_jax.models.preprocessing import Preprocessing
from cptv_jax.models.timm_weights import to_timm
from cptv_jax.models.weight_table import Entry, layer_norm_entries, linear_entries


@dataclass(frozen=True)
class MixerConfig:
    image_size: int = 8
    patch_size: int = 4
    width: int = 6
    hidden: tuple[int, ...] = (8, 5)  # of each block
    num_classes: int = 3

    @property
    def tokens(self) -> int:
        return (self.image_size // self.patch_size) ** 2


class Stem(nnx.Module):
    def __init__(self, config: MixerConfig, *, rngs: nnx.Rngs) -> None:
        self.side = config.patch_size
        self.proj = Linear(3 * self.side**2, config.width, rngs=rngs)

    def __call__(self, ops: Operations, images: Tensor) -> Tensor:
        x = ops.tensor("image", images)
        count, height, width, channels = x.shape
        grid = (height // self.side, width // self.side)
        x = x.move(lambda a: a.reshape(count, grid[0], self.side, grid[1], self.side, channels).swapaxes(2, 3))
        return self.proj(ops, "proj", x.move(lambda a: a.reshape(count, grid[0] * grid[1], -1)))


class Mix(nnx.Module):
    def __init__(self, config: MixerConfig, hidden: int, *, rngs: nnx.Rngs) -> None:
        self.norm = LayerNorm(config.width, 1e-6)
        self.tokens = Linear(config.tokens, config.tokens, bias=False, rngs=rngs)
        self.up = Linear(config.width, hidden, rngs=rngs)
        self.down = Linear(hidden, config.width, rngs=rngs)

    def __call__(self, ops: Operations, x: Tensor) -> Tensor:
        transposed = self.norm(ops, "norm", x).move(lambda a: a.swapaxes(1, 2))
        x = ops.add("mixed", x, self.tokens(ops, "tokens", transposed).move(lambda a: a.swapaxes(1, 2)))
        hidden = ops.gelu("gelu", self.up(ops, "up", x, hidden=True))
        return ops.add("sum", x, self.down(ops, "down", hidden))


class Pool(nnx.Module):
    def __init__(self, config: MixerConfig, *, rngs: nnx.Rngs) -> None:
        self.fc = Linear(config.width, config.num_classes, rngs=rngs)

    def __call__(self, ops: Operations, x: Tensor) -> Output:
        pooled = ops.tensor("mean", Tensor(jnp.mean(x.values, 1)))
        return Output(features=pooled.values, logits=self.fc(ops, "fc", pooled).values)


class Mixer(nnx.Module):
    def __init__(self, config: MixerConfig, *, rngs: nnx.Rngs) -> None:
        self.stem = Stem(config, rngs=rngs)
        for i, hidden in enumerate(config.hidden):
            setattr(self, f"mix{i}", Mix(config, hidden, rngs=rngs))
        self.count = len(config.hidden)
        self.pool = Pool(config, rngs=rngs)

    def stages(self) -> dict[str, nnx.Module]:
        # "mix" is the beginning of "mix.0": a name must not be taken for a prefix.
        names = ["mix", *(f"mix.{i}" for i in range(self.count - 1))]
        mixes = {name: getattr(self, f"mix{i}") for i, name in enumerate(names)}
        return {"stem": self.stem, **mixes, "pool": self.pool}


def weight_table(config: MixerConfig) -> list[Entry]:
    entries = linear_entries("patches", "stem", ("proj",), 3 * config.patch_size**2, config.width)
    for i, hidden in enumerate(config.hidden):
        stage = "mix" if i == 0 else f"mix.{i - 1}"
        entries += layer_norm_entries(f"layers.{i}.norm", stage, ("norm",), config.width)
        entries += linear_entries(f"layers.{i}.tokens", stage, ("tokens",), config.tokens, config.tokens, bias=False)
        entries += linear_entries(f"layers.{i}.up", stage, ("up",), config.width, hidden)
        entries += linear_entries(f"layers.{i}.down", stage, ("down",), hidden, config.width)
    return entries + linear_entries("head", "pool", ("fc",), config.width, config.num_classes)


MIXER = register_family(Family("mixer-of-a-test", MixerConfig, Mixer, weight_table, ("mix*.weight",), "stem.image"))
SIZES = Preprocessing(image_size=8, crop_fraction=1.0, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
ARCHITECTURE = Architecture("mixer_small", MIXER, MixerConfig(), SIZES)


def make_model(architecture: Architecture = ARCHITECTURE) -> Model:
    """Large random weights, as small ones leave all outputs alike."""
    rng = np.random.default_rng(0)
    weights = jax.tree.map(
        lambda a: jnp.asarray(a + rng.normal(scale=0.5, size=a.shape), jnp.float32), architecture.initialize(0)
    )
    return Model(architecture, weights)


def make_images(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, 8, 8, 3)).astype(np.float32)


def reference(model: Model, images: np.ndarray) -> np.ndarray:
    """Its logits in NumPy, float64."""

    def array(name: str, part: str) -> np.ndarray:
        return np.asarray(model.layer(name)[part], np.float64)

    def linear(name: str, x: np.ndarray) -> np.ndarray:
        layer = model.layer(name)
        return x @ array(name, "kernel") + (array(name, "bias") if "bias" in layer else 0)

    count = len(images)
    x = images.astype(np.float64).reshape(count, 2, 4, 2, 4, 3).swapaxes(2, 3).reshape(count, 4, -1)
    x = linear("stem.proj", x)
    for stage in ("mix", "mix.0"):
        normal = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
        normal = normal * array(f"{stage}.norm", "weight") + array(f"{stage}.norm", "bias")
        x = x + linear(f"{stage}.tokens", normal.swapaxes(1, 2)).swapaxes(1, 2)
        hidden = linear(f"{stage}.up", x)
        gelu = np.asarray(jax.nn.gelu(jnp.asarray(hidden, jnp.float32), approximate=False), np.float64)
        x = x + linear(f"{stage}.down", gelu)
    return linear("pool.fc", x.mean(1))


def test_its_stages_compute_the_model() -> None:
    model, images = make_model(), make_images(3)
    stages = model.stages()
    assert [stage.name for stage in stages] == list(ARCHITECTURE.stage_names) == ["stem", "mix", "mix.0", "pool"]
    # float32 against float64, a few sums of at most 48 terms
    np.testing.assert_allclose(forward(stages, images).logits, reference(model, images), rtol=0, atol=2e-5)


def test_its_sites_know_stage_and_layer_where_one_stage_s_name_begins_another_s() -> None:
    sites = {site.name: site for site in sites_of(ARCHITECTURE)}
    assert (sites["mix.0.up.weight"].stage, sites["mix.0.up.weight"].layer) == ("mix.0", "up")
    assert (sites["mix.up.weight"].stage, sites["mix.up.weight"].layer_name) == ("mix", "mix.up")
    assert [site.name for site in sites.values() if site.kind == "image"] == ["stem.image"]


def config(**recipe: Any) -> QuantizeConfig:
    return QuantizeConfig(
        recipe=RecipeConfig(weight_bits=3, **recipe),
        calibration=CalibrationConfig(images=12, batch=4),
        # The sites are the family's own.
        search=SearchConfig(Generational(passes=1, children=3, rounds=1, sigma=0.1), JudgeConfig(holdout=0.0)),
    )


def test_it_is_quantized_searched_saved_and_loaded(tmp_path: Path) -> None:
    model, images = make_model(), make_images(12)
    labels = np.argmax(reference(model, make_images(6, 1)), 1)
    found = quantize(
        model, images_from_arrays(images), config(), out=tmp_path / "run",
        evaluation=images_from_arrays(make_images(6, 1), labels),
    )  # fmt: skip
    moved = [site for site, quantizer in found.model.quantizers.items() if not np.array_equal(
        quantizer.scale, found.base.quantizers[site].scale
    )]  # fmt: skip
    assert moved and all(site.startswith("mix") and site.endswith(".weight") for site in moved)
    again = load_model(str(tmp_path / "run"))
    assert isinstance(again, QuantizedModel)
    assert again.model.architecture == ARCHITECTURE and again.recipe == found.model.recipe
    np.testing.assert_array_equal(forward(again.stages(), images).logits, forward(found.model.stages(), images).logits)
    report = (tmp_path / "run" / "report.md").read_text()
    assert "mixer_small" in report and "mix.0.tokens.weight" in report


@pytest.mark.parametrize("quantize_input", [True, False])
def test_its_image_site_is_what_recipes_take_for_the_image(quantize_input: bool) -> None:
    recipe = resolve(RecipeConfig(preset="fq-vit", quantize_input=quantize_input), sites_of(ARCHITECTURE))
    assert ("stem.image" in recipe.sites) == quantize_input


def test_a_file_of_its_weights_is_read_by_its_table(tmp_path: Path) -> None:
    model = make_model()
    tensors: dict[str, Any] = to_timm(model.weights, ARCHITECTURE)
    assert tensors["layers.1.up.weight"].shape == (5, 6)
    np.savez(tmp_path / "weights.npz", **tensors)
    again = load_model(str(tmp_path / "weights.npz"), ARCHITECTURE)
    assert isinstance(again, Model)
    jax.tree.map(np.testing.assert_array_equal, again.weights, model.weights)
    assert list(again.weights) == list(model.weights)
    with pytest.raises(InputError, match="cannot tell the architecture"):
        load_model(str(tmp_path / "weights.npz"))


def test_a_table_that_does_not_fit_the_modules_is_refused(tmp_path: Path) -> None:
    family = replace(MIXER, weight_table=lambda config: weight_table(config)[1:])
    tensors: dict[str, Any] = to_timm(make_model().weights, ARCHITECTURE)
    del tensors["patches.weight"]
    np.savez(tmp_path / "weights.npz", **tensors)
    with pytest.raises(InputError, match=r"weight table of family mixer-of-a-test does not fit .*'stem\.proj\.kernel'"):
        load_model(str(tmp_path / "weights.npz"), replace(ARCHITECTURE, family=family))


def test_a_checkpoint_of_a_family_that_is_not_registered_is_refused(tmp_path: Path) -> None:
    architecture = replace(ARCHITECTURE, family=replace(MIXER, name="mixer-of-a-tes"))
    save_model(tmp_path / "model", Model(architecture, architecture.initialize(0)))
    with pytest.raises(
        InputError,
        match=r"family 'mixer-of-a-tes', which is not registered; did you mean 'mixer-of-a-test'\?; import the code",
    ):
        load_model(str(tmp_path / "model"))


def test_another_family_of_the_same_name_is_refused() -> None:
    with pytest.raises(InputError, match="there is a model family 'mixer-of-a-test' already"):
        register_family(replace(MIXER, image_site=""))


class MisnamedStem(Stem):
    site = "projection"

    def __call__(self, ops: Operations, images: Tensor) -> Tensor:
        x = ops.tensor("image", images)
        x = self.proj(ops, self.site, x.move(lambda a: a.reshape(len(a), 4, -1)))
        return ops.add("sum", x, x)


class TwiceNamedStem(MisnamedStem):
    site = "sum"


@pytest.mark.parametrize(
    "stem, image_site, message",
    [
        (
            MisnamedStem,
            "",
            r"stage stem has no kernel at 'projection', the site of a linear layer; known: proj; name the site after",
        ),
        (TwiceNamedStem, "", "two operations of stage stem have the site 'sum'"),
        (
            Stem,
            "stem.imag",
            r"image_site is 'stem\.imag', which is not a site of mixer_small; did you mean 'stem\.image'",
        ),
    ],
)
def test_mistakes_in_a_family_are_named(stem: type[Stem], image_site: str, message: str) -> None:
    class WithStem(Mixer):
        def __init__(self, config: MixerConfig, *, rngs: nnx.Rngs) -> None:
            super().__init__(config, rngs=rngs)
            self.stem = stem(config, rngs=rngs)

    family = replace(MIXER, module=WithStem, image_site=image_site)
    with pytest.raises(InputError, match=message):
        sites_of(replace(ARCHITECTURE, family=family))
