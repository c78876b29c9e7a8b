"""The configuration: strict YAML, and a flag for every field."""

import argparse
import re
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from cptv_jax import CalibrationConfig, InputError, QuantizeConfig, RecipeConfig, SearchConfig, load_config, resolve
from cptv_jax.cli.main import _parser
from cptv_jax.config.loading import from_mapping, override
from cptv_jax.config.schema import check, completed_search, effort, flatten, objectives, to_mapping
from cptv_jax.models.architecture import sites_of
from cptv_jax.models.zoo import ZOO
from cptv_jax.pipeline.plan import _searched

CONFIGS = sorted((Path(__file__).resolve().parents[2] / "configs").glob("*.yaml"))

# A value for each field that differs from the default, as one would type it, and what it means.
TYPED: dict[str, tuple[str, Any]] = {
    "method": ("erq", "erq"),
    "seed": ("7", 7),
    "recipe.preset": ("fq-vit", "fq-vit"),
    "recipe.weight_bits": ("3", 3),
    "recipe.activation_bits": ("6", 6),
    "recipe.softmax_bits": ("4", 4),
    "recipe.weight_observer": ("omse", "omse"),
    "recipe.activation_observer": ("percentile", "percentile"),
    "recipe.weight_signed": ("true", True),
    "recipe.bias_correction": ("false", False),
    "recipe.low_rank": ("true", True),
    "recipe.power_of_two_factor": ("false", False),
    "recipe.integer_layer_norm": ("no", False),
    "recipe.log_int_softmax": ("yes", True),
    "recipe.quantize_input": ("false", False),
    "recipe.overrides": (
        '{"*.fc1.weight": {bits: 4, bias_correction: false}, head.fc: null}',
        {"*.fc1.weight": {"bits": 4, "bias_correction": False}, "head.fc": None},
    ),
    "ptq4vit.images": ("64", 64),
    "ptq4vit.metric": ("l2", "l2"),
    "ptq4vit.alpha": ("1e-1", 0.1),
    "ptq4vit.beta": ("1.5", 1.5),
    "ptq4vit.candidates": ("50", 50),
    "ptq4vit.rounds": ("2", 2),
    "ptq4vit.softmax_form": ("published", "published"),
    "ptq4vit.images_at_once": ("5", 5),
    "ptq4vit.candidates_at_once": ("3", 3),
    "repq_vit.images": ("64", 64),
    "repq_vit.round_zero_point": ("true", True),
    "erq.images": ("64", 64),
    "erq.coe": ("1e4", 1e4),
    "erq.flips": ("0", 0),
    "erq.round_zero_point": ("true", True),
    "aiqvit.images": ("16", 16),
    "aiqvit.search_images": ("64", 64),
    "aiqvit.search_steps": ("0", 0),
    "aiqvit.ranks": ("[4, 8]", (4, 8)),
    "aiqvit.penalty": ("0.1", 0.1),
    "calibration.images": ("32", 32),
    "calibration.batch": ("16", 16),
    "reconstruction.steps": ("50", 50),
    "reconstruction.batch": ("8", 8),
    "reconstruction.images": ("64", 64),
    "reconstruction.scale_rate": ("1e-2", 1e-2),
    "reconstruction.zero_point_rate": ("0", 0.0),
    "reconstruction.rounding_rate": ("2e-2", 2e-2),
    "reconstruction.weight_rate": ("1e-4", 1e-4),
    "reconstruction.low_rank_rate": ("0", 0.0),
    "reconstruction.easy_first": ("0.5", 0.5),
    "reconstruction.float_input": ("0", 0.0),
    "reconstruction.importance": ("none", "none"),
    "search.strategy": ("generational", "generational"),
    "search.objective": ("mse", "mse"),
    "search.on": ("features", "features"),
    "search.temperature": ("2", 2.0),
    "search.teacher": ("published", "published"),
    "search.sites": ("['*.weight', head.fc]", ("*.weight", "head.fc")),
    "search.offsets": ("true", True),
    "search.rounding": ("false", False),
    "search.passes": ("3", 3),
    "search.rounds": ("2", 2),
    "search.holdout": ("0", 0.0),
    "search.images": ("200", 200),
    "search.population": ("5", 5),
    "search.samples": ("4", 4),
    "search.step": ("1e-4", 1e-4),
    "search.sigma": ("5.e-2", 0.05),
    "search.children": ("4", 4),
    "search.survivors": ("1", 1),
    "search.algorithm": ("SNES", "SNES"),
    "search.gradient_steps": ("40", 40),
    "search.gradient_rate": ("5e-3", 5e-3),
    "search.gradient_batch": ("25", 25),
    "search.gradient_objective": ("cosine", "cosine"),
    "search.gradient_matching": ("2.5", 2.5),
    "search.mirror": ("false", False),
    "search.mixup": ("false", False),
    "search.patience": ("2", 2),
    "search.race": ("true", True),
    "search.arithmetic": ("bf16-codes", "bf16-codes"),
    "search.memory_gib": ("1.5", 1.5),
    "search.images_at_once": ("5", 5),
    "search.candidates_at_once": ("2", 2),
    "search.population_devices": ("2", 2),
    "search.cache_gib": (".inf", float("inf")),
}
CHANGED = override(QuantizeConfig(), {name: text for name, (text, _) in TYPED.items()})


def parsed(*words: str) -> argparse.Namespace:
    return _parser().parse_args(["quantize", "model", "--images", "images", "--out", "out", *words])


def test_every_field_has_an_example_here() -> None:
    assert list(TYPED) == list(flatten(QuantizeConfig()))


@pytest.mark.parametrize("name", flatten(QuantizeConfig()))
@pytest.mark.parametrize("words", [1, 2])
def test_every_field_has_a_flag(name: str, words: int) -> None:
    text, value = TYPED[name]
    flag = [f"--{name}={text}"] if words == 1 else [f"--{name}", text]
    given = {name: getattr(parsed(*flag), name)}
    config = override(QuantizeConfig(), given)
    assert flatten(config) == {**flatten(QuantizeConfig()), name: value}
    assert flatten(config)[name] != flatten(QuantizeConfig())[name]
    assert type(flatten(config)[name]) is type(value)


def test_fields_that_are_not_given_are_not_overridden() -> None:
    assert not [name for name in flatten(QuantizeConfig()) if name in vars(parsed())]


@pytest.mark.parametrize("config", [QuantizeConfig(), CHANGED], ids=["defaults", "changed"])
def test_yaml_and_back_is_the_same_configuration(config: QuantizeConfig, tmp_path: Path) -> None:
    text = yaml.safe_dump(to_mapping(config), sort_keys=False)
    (tmp_path / "c.yaml").write_text(text)
    again = load_config(str(tmp_path / "c.yaml"))
    assert again == config
    assert yaml.safe_dump(to_mapping(again), sort_keys=False) == text


def test_an_empty_file_and_no_file_are_the_defaults(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("# nothing yet\n")
    assert load_config(str(tmp_path / "c.yaml")) == load_config(None) == QuantizeConfig()


@pytest.mark.parametrize(("text", "value"), [("1e-3", 1e-3), ("1E4", 1e4), ("-2.5e-1", -0.25), ("3", 3.0), (".5", 0.5)])
def test_numbers_in_every_spelling_are_numbers(tmp_path: Path, text: str, value: float) -> None:
    (tmp_path / "c.yaml").write_text(f"search: {{step: {text}}}")
    step = load_config(str(tmp_path / "c.yaml")).search.step
    assert step == value
    assert isinstance(step, float)


def test_flags_win_over_the_file(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("seed: 1\nsearch: {passes: 5, rounds: 4}")
    config = override(load_config(str(tmp_path / "c.yaml")), {"search.passes": "2"})
    assert (config.seed, config.search.passes, config.search.rounds) == (1, 2, 4)


@pytest.mark.parametrize("text", ["*.attn.qkv.weight", "'*.attn.qkv.weight'", "['*.attn.qkv.weight']"])
def test_a_pattern_needs_no_quotes_and_one_needs_no_list(text: str) -> None:
    assert override(QuantizeConfig(), {"search.sites": text}).search.sites == ("*.attn.qkv.weight",)


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("search.passes", "1.5", "search.passes is 1.5; it must be a whole number"),
        ("search.population", "null", "search.population is None; it must be a whole number"),
        ("search.passes", "yes", "search.passes is True; it must be a whole number"),
        ("search.holdout", "some", "search.holdout is 'some'; it must be a number"),
        ("search.holdout", "true", "search.holdout is True; it must be a number"),
        ("search.images", "all", "search.images is 'all'; it must be a whole number"),
        ("search.sites", "[]", "search.sites must be a list that is not empty"),
        ("search.sites", "[1]", "search.sites is 1; it must be text"),
        ("search.sites", "3", "search.sites must be a list that is not empty"),
        ("search.strategy", "[evol-q]", "search.strategy is ['evol-q']; did you mean 'evol-q'?"),
        ("recipe.weight_signed", "1", "recipe.weight_signed is 1; it must be true or false"),
        ("recipe.overrides", "[a]", "recipe.overrides must be a mapping"),
        ("recipe.overrides", "{", "recipe.overrides must be a mapping"),
        ("method", "8", "method is 8; it must be text"),
    ],
)
def test_values_of_the_wrong_type_are_refused_by_name(name: str, text: str, says: str) -> None:
    with pytest.raises(InputError) as caught:
        override(QuantizeConfig(), {name: text})
    assert says in str(caught.value)


def test_unknown_names_are_refused_with_the_nearest() -> None:
    with pytest.raises(InputError, match=r"unknown option --search.pases; did you mean 'search.passes'\?"):
        override(QuantizeConfig(), {"search.pases": "3"})
    with pytest.raises(InputError, match=r"c.yaml: unknown field 'calibration.imags'; did you mean 'images'\?"):
        from_mapping(QuantizeConfig, {"calibration": {"imags": 3}}, "c.yaml")
    with pytest.raises(InputError, match=r"c.yaml: unknown field '3'; known: aiqvit, calibration, .*method, "):
        from_mapping(QuantizeConfig, {3: 3}, "c.yaml")


@pytest.mark.parametrize(
    "config",
    [
        QuantizeConfig(seed=-1),
        QuantizeConfig(seed=2**32),
        QuantizeConfig(calibration=CalibrationConfig(images=0)),
        QuantizeConfig(calibration=CalibrationConfig(batch=0)),
        *(
            QuantizeConfig(search=SearchConfig(**{name: 0}))  # type: ignore[arg-type]
            for name in (
                *("temperature", "passes", "rounds", "images", "population", "samples", "step", "sigma", "children"),
                *("survivors", "images_at_once", "candidates_at_once", "cache_gib"),
            )
        ),
        *(QuantizeConfig(search=SearchConfig(holdout=value)) for value in (-0.1, 1.0, float("nan"))),
        *(QuantizeConfig(search=SearchConfig(sigma=value)) for value in (float("inf"), float("nan"))),
    ],
)
def test_values_that_no_run_can_use_are_refused_by_name(config: QuantizeConfig) -> None:
    name = next(name for name, value in flatten(config).items() if value != flatten(QuantizeConfig())[name])
    with pytest.raises(InputError, match=f"^{name} is .*; it must be"):
        check(config)


@pytest.mark.parametrize("seed", [0, 2**32 - 1])
def test_the_seeds_that_are_allowed_work(seed: int) -> None:
    import jax
    import numpy as np

    check(QuantizeConfig(seed=seed))
    jax.random.key(seed)
    np.random.default_rng([seed, 1])


@pytest.mark.parametrize("path", CONFIGS, ids=[path.stem for path in CONFIGS])
def test_the_configurations_that_we_ship_are_valid(path: Path) -> None:
    config = load_config(str(path))
    check(config)
    recipe = resolve(config.recipe, sites_of(ZOO["deit_tiny_patch16_224"]))
    bits = re.search(r"_w(\d+)a(\d+)$", path.stem)
    if bits:
        assert (config.recipe.weight_bits, config.recipe.activation_bits) == (int(bits[1]), int(bits[2]))
        assert recipe.sites["blocks.0.attn.qkv.weight"].bits == int(bits[1])


def test_there_are_configurations_to_ship() -> None:
    assert {"evol-q_w3a8", "evol-q_w4a8", "evol-q_w8a8", "fq-vit"} <= {path.stem for path in CONFIGS}


def test_the_recipe_in_a_mapping_is_plain_data() -> None:
    recipe, search = RecipeConfig(overrides={"head.fc": {"bits": 4}}), SearchConfig(sites=("*.weight",))
    config = QuantizeConfig(recipe=recipe, search=search)
    assert to_mapping(config)["recipe"] == asdict(config.recipe)
    assert to_mapping(config)["search"]["sites"] == ["*.weight"]


@pytest.mark.parametrize(
    ("strategy", "wanted"),
    [("evol-q", (10, 3, 8)), ("generational", (10, 3, 8)), ("evosax", (10, 3, 8)), ("guided", (1, 1, 3))],
)
def test_a_search_does_what_its_strategy_needs_unless_told(strategy: Any, wanted: tuple[int, int, int]) -> None:
    assert effort(SearchConfig(strategy=strategy)) == wanted
    assert effort(SearchConfig(strategy=strategy, passes=7, rounds=5, children=6)) == (7, 5, 6)
    done = completed_search(SearchConfig(strategy=strategy))
    assert (done.passes, done.rounds, done.children) == wanted


@pytest.mark.parametrize(
    ("search", "batch", "available", "wanted"),
    [
        (SearchConfig(), 100, 9, 9),
        (SearchConfig(images=300), 100, 9, 3),
        (SearchConfig(strategy="guided"), 100, 9, 2),
        (SearchConfig(strategy="guided"), 32, 3, 3),
        (SearchConfig(strategy="guided"), 500, 2, 1),
        (SearchConfig(strategy="guided", images=800), 100, 9, 8),
    ],
)
def test_guided_judges_on_some_of_the_images_unless_told(
    search: SearchConfig, batch: int, available: int, wanted: int
) -> None:
    assert _searched(search, batch, available) == wanted


@pytest.mark.parametrize(
    ("search", "judging", "proposing"),
    [
        (SearchConfig(), "infonce", "infonce"),  # as published
        (SearchConfig(strategy="guided"), "kl", "infonce"),
        (SearchConfig(strategy="guided", objective="mse"), "mse", "mse"),
        (SearchConfig(strategy="guided", gradient_objective="mse"), "kl", "mse"),
        (SearchConfig(strategy="guided", objective="cosine", gradient_objective="mse"), "cosine", "mse"),
        (SearchConfig(strategy="generational", objective="mse"), "mse", "mse"),
    ],
)
def test_what_is_differentiated_follows_the_objective_where_one_is_named(
    search: SearchConfig, judging: str, proposing: str
) -> None:
    assert [one.name for one in objectives(search)] == [judging, proposing]
    assert objectives(completed_search(search)) == objectives(search)  # as a saved configuration has it
    both = replace(search, on="features", temperature=2.0)
    assert all((one.on, one.temperature) == ("features", 2.0) for one in objectives(both))


def test_an_unknown_objective_to_differentiate_is_refused() -> None:
    with pytest.raises(InputError, match=r"^search\.gradient_objective is 'infonse'; did you mean 'infonce'"):
        check(QuantizeConfig(search=SearchConfig(strategy="guided", gradient_objective="infonse")))
