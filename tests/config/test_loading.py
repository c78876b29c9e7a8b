"""Configuration files: YAML 1.2, strict, and of the present form."""

from pathlib import Path
from typing import Any

import pytest

from cptv_jax import InputError, QuantizeConfig, load_config
from cptv_jax.config.loading import config_from
from cptv_jax.config.older import is_older, translate
from cptv_jax.config.yaml12 import read_value, read_yaml
from cptv_jax.methods.erq import ErqOptions
from cptv_jax.options import to_mapping
from cptv_jax.search import EvolQ, Guided


def load(path: Path, text: str) -> QuantizeConfig:
    (path / "c.yaml").write_text(text)
    return load_config(path / "c.yaml")


def test_an_empty_file_and_no_file_are_the_defaults(tmp_path: Path) -> None:
    assert load(tmp_path, "# nothing yet\n") == load_config(None) == QuantizeConfig()


@pytest.mark.parametrize(("text", "value"), [("1e-3", 1e-3), ("1E4", 1e4), ("2.5e-1", 0.25), ("3", 3.0), (".5", 0.5)])
def test_numbers_in_every_spelling_are_numbers(tmp_path: Path, text: str, value: float) -> None:
    step = load(tmp_path, f"search: {{strategy: {{name: evol-q, step: {text}}}}}").search.strategy.step
    assert step == value
    assert isinstance(step, float)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("on", "on"),
        ("off", "off"),
        ("yes", "yes"),
        ("no", "no"),
        ("true", True),
        ("FALSE", False),
        ("010", 10),
        ("0x1f", 31),
        ("1:30", "1:30"),
        ("1_000", "1_000"),
        ("2001-01-01", "2001-01-01"),
        ("-3", -3),
        ("1e-3", 1e-3),
        (".inf", float("inf")),
        ("~", None),
        ("null", None),
        ("", None),
        ("nullify", "nullify"),
        ("on: features", {"on": "features"}),
    ],
)
def test_yaml_is_read_by_version_1_2(text: str, value: Any) -> None:
    found = read_yaml(text, "x")
    assert found == value and type(found) is type(value)


def test_the_field_on_needs_no_quotes(tmp_path: Path) -> None:
    assert load(tmp_path, "search:\n  judge:\n    on: features\n").search.judge.on == "features"


def test_a_key_given_twice_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"c\.yaml is not valid YAML: 'weight_bits' is given twice .*line 3"):
        load(tmp_path, "recipe:\n  weight_bits: 4\n  weight_bits: 8\n")
    with pytest.raises(InputError, match="'1' is given twice"):
        read_yaml("{1: a, 1: b}", "x")


def test_a_pattern_in_a_file_needs_quotes_and_the_remedy_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"c\.yaml is not valid YAML.*put names that begin with \* in quotes"):
        load(tmp_path, "search: {space: {sites: [*.weight]}}\n")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("*.attn.qkv.weight", "*.attn.qkv.weight"),
        ("[*.weight, head.fc]", ["*.weight", "head.fc"]),
        ("{*.weight: {bits: 8}}", {"*.weight": {"bits": 8}}),
        ("'*.weight'", "*.weight"),
    ],
)
def test_a_pattern_in_a_value_needs_no_quotes(text: str, value: Any) -> None:
    assert read_value(text, "--x") == value


def test_a_value_that_is_no_yaml_is_refused_by_its_flag() -> None:
    with pytest.raises(InputError, match="--recipe.overrides is not valid YAML"):
        read_value("{", "--recipe.overrides")


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ({"search": {"gradient_steps": 3}}, "search.gradient_steps is of an older cptv.*; write search.strategy.steps"),
        ({"search": {"passes": 3}}, "search.passes is of an older cptv.*; write search.strategy.passes"),
        ({"search": {"strategy": "guided", "sites": ["*"]}}, "search.sites is .*; write search.space.sites"),
        ({"erq": {"flips": 3}}, r"erq is of an older cptv.*; write {name: erq, ...} under method"),
        ({"repq_vit": {}}, r"repq_vit is .*; write {name: repq-vit, ...} under method"),
    ],
)
def test_a_configuration_of_an_older_cptv_is_refused_with_the_new_place(data: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=f"^c.yaml: {says}"):
        config_from(data, "c.yaml")
    assert is_older(data)


def test_what_is_alike_in_both_forms_is_read() -> None:
    data = {"method": "erq", "search": {"strategy": "guided"}}
    assert not is_older(data)
    assert config_from(data, "x").method == ErqOptions()


def test_a_translated_configuration_keeps_what_counts_and_drops_what_others_had() -> None:
    older = {
        "method": "erq",
        "seed": 3,
        "recipe": {"weight_bits": 4},
        "erq": {"images": 32, "coe": None, "flips": 7},
        "ptq4vit": {"images": 9},
        "search": {
            **{"strategy": "guided", "gradient_steps": 60, "population": 15, "passes": None, "objective": "kl"},
            **{"sites": ["*"], "holdout": 0.2, "race": False, "sigma": 0.02},
        },
    }
    found = config_from(translate(older), "x")
    assert found.method == ErqOptions(flips=7) and found.seed == 3 and found.recipe.weight_bits == 4
    assert found.search.strategy == Guided(steps=60, sigma=0.02)
    assert (found.search.judge.objective, found.search.judge.holdout) == ("kl", 0.2)
    assert found.search.space.sites == ("*",)
    assert config_from(translate({}), "x") == QuantizeConfig()
    assert config_from(translate({"search": {"strategy": "evol-q", "step": 0.5}}), "x").search.strategy == EvolQ(
        step=0.5
    )
    assert not is_older(to_mapping(found))
