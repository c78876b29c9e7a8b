"""Recipes: what each preset quantizes and how, and what a user may change."""

import dataclasses
import re
from dataclasses import replace
from typing import Any

import pytest

from cptv_jax.errors import InputError
from cptv_jax.models.architecture import Architecture, sites_of
from cptv_jax.models.preprocessing import Preprocessing
from cptv_jax.models.vit import ViTConfig
from cptv_jax.models.vit_family import VIT
from cptv_jax.recipe.presets import PRESETS
from cptv_jax.recipe.resolve import RecipeConfig, resolve
from cptv_jax.recipe.spec import Recipe, SiteSpec

ARCHITECTURE = Architecture(
    "small", VIT, ViTConfig(image_size=16, patch_size=8, num_classes=5, width=8, depth=2, heads=2),
    Preprocessing(image_size=16),
)  # fmt: skip

WEIGHTS = ("attn.qkv.weight", "attn.proj.weight", "mlp.fc1.weight", "mlp.fc2.weight")
RESIDUALS = ("residual1", "residual2")
ACTIVATIONS = ("norm1", "attn.qkv", "attn.scores", "attn.context", "attn.proj", "norm2", "mlp.gelu", "mlp.fc2")
# fc1's output is read by the GELU alone, and query, key and value are pieces of qkv: published code quantizes neither.
NEVER = ("mlp.fc1", "attn.query", "attn.key", "attn.value")


def make(**fields: Any) -> Recipe:
    return resolve(RecipeConfig(**fields), sites_of(ARCHITECTURE))


def table(weight: SiteSpec, activation: SiteSpec, residual: SiteSpec, softmax: SiteSpec) -> dict[str, SiteSpec]:
    """The sites that the published ViT quantizes, spelled out."""
    expected = {
        "embed.input": activation,
        "embed.proj.weight": weight,
        "embed.proj": activation,
        "embed.tokens": activation,
        "embed.pos_embed": activation,
        "embed.sum": residual,
    }
    for i in range(2):
        expected |= {f"blocks.{i}.{name}": weight for name in WEIGHTS}
        expected |= {f"blocks.{i}.{name}": activation for name in ACTIVATIONS}
        expected |= {f"blocks.{i}.{name}": residual for name in RESIDUALS}
        expected |= {f"blocks.{i}.attn.softmax": softmax}
    return expected | {"head.norm": activation, "head.fc.weight": weight, "head.fc": activation}


# Presets


def test_evol_q() -> None:
    recipe = make(preset="evol-q", weight_bits=4)
    activation = SiteSpec("uniform", 8, observer="omse")
    assert recipe.sites == table(
        weight=SiteSpec("uniform", 4, per_channel=True, observer="minmax", bias_correction=True),
        activation=activation,
        residual=SiteSpec("uniform", 8, per_channel=True, observer="ptf"),
        softmax=activation,
    )
    assert recipe.name == "evol-q"
    assert recipe.integer_layer_norm and not recipe.log_int_softmax
    assert make(weight_bits=4) == recipe  # the default


def test_evol_q_with_omse_weights() -> None:
    recipe = make(preset="evol-q-omse", weight_bits=3, activation_bits=6)
    activation = SiteSpec("uniform", 6, observer="omse")
    assert recipe.sites == table(
        weight=SiteSpec("uniform", 3, per_channel=True, observer="omse", bias_correction=True),
        activation=activation,
        residual=SiteSpec("uniform", 6, per_channel=True, observer="ptf"),
        softmax=activation,
    )
    assert not recipe.integer_layer_norm and not recipe.log_int_softmax


def test_fq_vit() -> None:
    recipe = make(preset="fq-vit")
    assert recipe.sites == table(
        weight=SiteSpec("uniform", 8, signed=True, symmetric=True, per_channel=True, observer="minmax"),
        activation=SiteSpec("uniform", 8, observer="minmax"),
        residual=SiteSpec("uniform", 8, per_channel=True, observer="ptf"),
        softmax=SiteSpec("log2", 4),
    )
    assert recipe.integer_layer_norm and recipe.log_int_softmax


@pytest.mark.parametrize("preset", [name for name, preset in PRESETS.items() if preset.scope == "full"])
def test_what_stays_in_float(preset: str) -> None:
    quantized = set(make(preset=preset).sites)
    assert {site.name for site in sites_of(ARCHITECTURE)} - quantized == {
        f"blocks.{i}.{name}" for i in range(2) for name in NEVER
    }


@pytest.mark.parametrize("preset", ["ptq4vit", "base-ptq"])
def test_ptq4vit_and_its_baseline(preset: str) -> None:
    """What linear layers and matmuls read, and weights, but not the image; signed symmetric, set by the method."""
    recipe = make(preset=preset, weight_bits=4, activation_bits=6)
    common: dict[str, Any] = {"signed": True, "symmetric": True, "observer": "method"}
    weight, activation = SiteSpec("uniform", 4, **common), SiteSpec("uniform", 6, **common)
    head = SiteSpec("uniform", 6, per_head=True, **common)
    qkv = SiteSpec("uniform", 4, parts=3, **common)
    twin = preset == "ptq4vit"
    expected = {"embed.proj.weight": SiteSpec("uniform", 4, per_channel=twin, **common)}
    for i in range(2):
        expected |= {f"blocks.{i}.{name}": weight for name in ("attn.proj.weight", "mlp.fc1.weight", "mlp.fc2.weight")}
        expected |= {f"blocks.{i}.{name}": activation for name in ("norm1", "attn.context", "norm2")}
        expected |= {f"blocks.{i}.attn.{name}": head for name in ("query", "key", "value")}
        expected[f"blocks.{i}.attn.qkv.weight"] = qkv
        expected[f"blocks.{i}.attn.softmax"] = SiteSpec("twin-softmax", 6, **common) if twin else head
        expected[f"blocks.{i}.mlp.gelu"] = SiteSpec("twin-gelu", 6, **common) if twin else activation
    assert recipe.sites == expected | {"head.norm": activation, "head.fc.weight": weight}
    assert not recipe.integer_layer_norm and not recipe.log_int_softmax and recipe.scope == "matmuls"


def test_granularities_that_do_not_fit_are_refused() -> None:
    def message(site: str, **change: Any) -> str:
        return refusal(preset="ptq4vit", overrides={site: change})

    assert "do not make 5 equal parts" in message("blocks.0.attn.proj.weight", parts=5)
    assert "do not make 0 equal parts" in message("blocks.0.attn.proj.weight", parts=0)
    assert "lacks; set it to false" in message("blocks.0.attn.proj.weight", per_head=True)
    assert "exclude each other" in message("blocks.0.attn.qkv.weight", per_channel=True)
    assert "set parts: 1" in message("blocks.0.attn.qkv.weight", bias_correction=True)
    assert "knows neither parts nor per_head" in message("blocks.0.attn.query", observer="minmax")
    assert "set by a method's search" in message("blocks.0.mlp.gelu", observer="minmax")


def test_a_stage_sees_its_own_sites_by_their_relative_names() -> None:
    recipe = make()
    assert set(recipe.of_stage("blocks.1")) == {*WEIGHTS, *ACTIVATIONS, *RESIDUALS, "attn.softmax"}
    assert recipe.of_stage("blocks.1")["attn.qkv"] == recipe.sites["blocks.1.attn.qkv"]
    assert set(recipe.of_stage("head")) == {"norm", "fc.weight", "fc"}


def test_of_stage_does_not_mix_block_1_with_block_10() -> None:
    deep = replace(ARCHITECTURE, config=replace(ARCHITECTURE.config, depth=11))
    recipe = resolve(RecipeConfig(overrides={"blocks.10.*": None}), sites_of(deep))
    assert recipe.of_stage("blocks.10") == {}
    assert set(recipe.of_stage("blocks.1")) == set(make().of_stage("blocks.1"))


# Fields of the configuration


def test_widths_go_to_weights_activations_and_softmax() -> None:
    recipe = make(weight_bits=3, activation_bits=5, softmax_bits=7)
    widths = {name: spec.bits for name, spec in recipe.sites.items()}
    for name, bits in widths.items():
        assert bits == (3 if name.endswith("weight") else 7 if name.endswith("softmax") else 5), name
    assert make(activation_bits=6).sites["blocks.0.attn.softmax"].bits == 6
    assert make(preset="fq-vit", softmax_bits=3).sites["blocks.0.attn.softmax"] == SiteSpec("log2", 3)
    # The preset's 4 bits are of the log2 quantizer; a uniform softmax is as wide as the other activations.
    assert make(preset="fq-vit", log_int_softmax=False).sites["blocks.0.attn.softmax"].bits == 8


def test_observers_and_bias_correction_can_be_chosen() -> None:
    recipe = make(weight_observer="ema", activation_observer="percentile", bias_correction=False)
    assert recipe.sites["head.fc.weight"] == SiteSpec(bits=8, per_channel=True, observer="ema")
    assert recipe.sites["head.fc"].observer == "percentile"
    assert recipe.sites["embed.sum"].observer == "ptf"


def test_signed_weights_are_symmetric_unless_omse_fits_a_zero_point() -> None:
    spec = make(weight_signed=True).sites["head.fc.weight"]
    assert spec.signed and spec.symmetric
    spec = make(weight_signed=True, weight_observer="omse").sites["head.fc.weight"]
    assert spec.signed and not spec.symmetric
    assert not make(preset="fq-vit", weight_signed=False).sites["head.fc.weight"].signed


def test_without_the_power_of_two_factor_layer_norm_is_float_and_residuals_are_like_other_activations() -> None:
    recipe = make(power_of_two_factor=False)
    assert recipe.sites["blocks.0.residual1"] == recipe.sites["blocks.0.attn.proj"]
    assert not recipe.integer_layer_norm
    recipe = make(integer_layer_norm=False)
    assert not recipe.integer_layer_norm and recipe.sites["embed.sum"].observer == "ptf"


def test_the_input_can_stay_in_float() -> None:
    assert set(make().sites) - set(make(quantize_input=False).sites) == {"embed.input"}


# Overrides


def test_a_pattern_changes_the_named_fields_of_every_site_it_matches() -> None:
    recipe = make(overrides={"blocks.*.mlp.fc1.weight": {"bits": 3, "observer": "omse"}})
    for name, spec in make().sites.items():
        hit = name in ("blocks.0.mlp.fc1.weight", "blocks.1.mlp.fc1.weight")
        assert recipe.sites[name] == (replace(spec, bits=3, observer="omse") if hit else spec)


def test_later_patterns_win_field_by_field() -> None:
    overrides = {"*.weight": {"bits": 3, "bias_correction": False}, "head.fc.weight": {"bits": 6}}
    recipe = make(overrides=overrides)
    assert (recipe.sites["head.fc.weight"].bits, recipe.sites["head.fc.weight"].bias_correction) == (6, False)
    assert recipe.sites["embed.proj.weight"].bits == 3
    recipe = make(overrides=dict(reversed(overrides.items())))
    assert recipe.sites["head.fc.weight"].bits == 3


def test_null_leaves_a_site_in_float_and_a_later_pattern_brings_it_back() -> None:
    gone = make(overrides={"head.*": None})
    assert set(make().sites) - set(gone.sites) == {"head.norm", "head.fc.weight", "head.fc"}
    back = make(overrides={"head.*": None, "head.fc": {"bits": 6}})
    assert back.sites["head.fc"] == SiteSpec(bits=6, observer="omse")
    assert "head.norm" not in back.sites


def test_a_site_that_the_preset_leaves_in_float_can_be_quantized() -> None:
    recipe = make(overrides={"blocks.0.attn.query": {"bits": 4}})
    assert recipe.sites["blocks.0.attn.query"] == SiteSpec(bits=4, observer="omse")
    assert "blocks.1.attn.query" not in recipe.sites


# Refusals


def refusal(**fields: Any) -> str:
    with pytest.raises(InputError) as caught:
        make(**fields)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_an_unknown_preset_is_refused_with_the_nearest() -> None:
    message = refusal(preset="evolq")
    assert "'evolq'" in message and "did you mean 'evol-q'?" in message
    assert f"known: {', '.join(sorted(PRESETS)[:8])}" in refusal(preset="zzz")


@pytest.mark.parametrize("field", ["weight_observer", "activation_observer"])
def test_an_unknown_observer_is_refused_with_the_nearest(field: str) -> None:
    message = refusal(**{field: "minmix"})
    assert "'minmix'" in message and "did you mean 'minmax'?" in message


def test_an_unknown_pattern_is_refused_with_the_nearest_site() -> None:
    message = refusal(overrides={"head.fc.wieght": None})
    assert "'head.fc.wieght'" in message and "did you mean 'head.fc.weight'?" in message


def test_a_pattern_of_another_architecture_is_refused() -> None:
    assert "'blocks.7.*'" in refusal(overrides={"blocks.7.*": {"bits": 4}})


def test_an_unknown_field_is_refused_with_the_nearest() -> None:
    message = refusal(overrides={"head.fc": {"bit": 4}})
    assert "head.fc" in message and "'bit'" in message and "did you mean 'bits'?" in message


def test_an_unknown_quantizer_or_observer_of_a_site_is_refused_with_the_nearest() -> None:
    message = refusal(overrides={"head.fc": {"quantizer": "log"}})
    assert "head.fc" in message and "did you mean 'log2'?" in message
    message = refusal(overrides={"head.fc": {"observer": "omes"}})
    assert "head.fc" in message and "did you mean 'omse'?" in message


@pytest.mark.parametrize("change", [4, "4", [4], True])
def test_an_override_that_is_no_mapping_is_refused(change: Any) -> None:
    assert "recipe.overrides.head.fc must be a mapping" in refusal(overrides={"head.fc": change})


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"per_channel": "yes"}, "per_channel is 'yes'; it must be true or false"),
        ({"symmetric": 3}, "symmetric is 3; it must be true or false"),
        ({"signed": None}, "signed is None; it must be true or false"),
        ({"bias_correction": 1}, "bias_correction is 1; it must be true or false"),
        ({"quantizer": 3}, "quantizer is 3; it must be a name"),
        ({"observer": ["omse"]}, "observer is ['omse']; it must be a name"),
        ({3: 4}, "unknown field '3'"),
    ],
)
def test_an_override_of_the_wrong_type_is_refused(change: Any, says: str) -> None:
    assert f"recipe.overrides.head.*: {says}" in refusal(overrides={"head.*": change})


WIDTH = r"{} is {}; it must be (at least 2|at most 8|a whole number)"


@pytest.mark.parametrize("bits", [1, 9, 0, -4, 3.5, True, "4", None])
def test_a_width_that_is_no_integer_from_2_to_8_is_refused(bits: Any) -> None:
    message = refusal(overrides={"head.fc": {"bits": bits}})
    assert f"{bits} bits" in message and "from 2 to 8" in message
    for name in ("weight_bits", "activation_bits"):
        assert re.fullmatch(WIDTH.format(name, re.escape(repr(bits))), refusal(**{name: bits}))


@pytest.mark.parametrize("bits", [1, 9, 3.5, True])
def test_a_softmax_width_that_is_no_integer_from_2_to_8_is_refused(bits: Any) -> None:
    for preset in PRESETS:
        assert re.fullmatch(WIDTH.format("softmax_bits", bits), refusal(preset=preset, softmax_bits=bits))


def test_observers_that_do_not_fit_the_granularity_are_refused() -> None:
    assert "'ptf' needs per_channel" in refusal(activation_observer="ptf")
    assert "'percentile' works per tensor" in refusal(weight_observer="percentile")


@pytest.mark.parametrize("site", ["embed.input", "*.attn.qkv", "*.query", "*.key", "*.softmax", "*.context"])
def test_channels_that_are_cut_or_summed_over_can_have_no_scales_of_their_own(site: str) -> None:
    with pytest.raises(InputError, match=r"its channels are not those of what reads it; set per_channel: false"):
        make(overrides={site: {"per_channel": True}})


def test_channels_that_a_layer_or_a_sum_reads_as_they_are_can_have_scales_of_their_own() -> None:
    recipe = make(overrides={site: {"per_channel": True} for site in ("*.norm1", "*.gelu", "*.value", "*.attn.proj")})
    assert recipe.sites["blocks.1.attn.value"].per_channel and recipe.sites["blocks.0.norm1"].per_channel


@pytest.mark.parametrize("quantizer", ["log2", "log-sqrt2", "focusing", "twin-softmax"])
def test_quantizers_of_attention_maps_are_for_nothing_else(quantizer: str) -> None:
    change = {"quantizer": quantizer, "observer": "method"}
    assert make(overrides={"*.softmax": change}).sites["blocks.0.attn.softmax"].quantizer == quantizer
    for site in ("blocks.0.norm1", "blocks.1.mlp.gelu", "head.fc.weight"):
        with pytest.raises(InputError, match=f"{site}: a {quantizer} quantizer is for attention maps"):
            make(overrides={site: change})


@pytest.mark.parametrize("flag", ["power_of_two_factor", "integer_layer_norm", "log_int_softmax"])
def test_flags_without_effect_are_refused(flag: str) -> None:
    assert make(preset="evol-q", **{flag: True}).scope == "full"
    assert make(preset="omse", **{flag: False}).scope == "matmuls"
    with pytest.raises(InputError, match=f"recipe.{flag} is true, but preset omse quantizes only what matmuls read"):
        make(preset="omse", **{flag: True})


def test_an_integer_layer_norm_without_its_factors_is_refused() -> None:
    assert not make(power_of_two_factor=False).integer_layer_norm
    with pytest.raises(InputError, match=r"needs power-of-two factors; set recipe\.power_of_two_factor to true"):
        make(power_of_two_factor=False, integer_layer_norm=True)


def test_a_recipe_says_that_it_leaves_layer_norm_in_float_where_its_preset_asks_for_integers() -> None:
    (remark,) = make(power_of_two_factor=False).remarks
    assert "LayerNorm runs in float arithmetic: preset evol-q asks for integer arithmetic" in remark
    assert "recipe.power_of_two_factor" in remark
    for fields in ({}, {"power_of_two_factor": False, "integer_layer_norm": False}, {"preset": "omse"}):
        assert make(**fields).remarks == ()


def test_a_recipe_of_a_site_that_the_architecture_lacks_is_refused() -> None:
    recipe = make()
    sites = {**recipe.sites, "blocks.1.atn.qkv": recipe.sites["blocks.1.attn.qkv"]}
    with pytest.raises(InputError, match=r"quantizes blocks\.1\.atn\.qkv, .*did you mean 'blocks\.1\.attn\.qkv'"):
        dataclasses.replace(recipe, sites=sites)
