"""A flag for every field of the configuration: its help, its value, its refusal."""

import re
from pathlib import Path
from typing import Any

import pytest

from cptv_jax import InputError, QuantizeConfig, SearchConfig, load_config
from cptv_jax.cli.flags import choose, explain, flags_of, groups_of, override, spell
from cptv_jax.cli.quantize import parser_for
from cptv_jax.methods.aiqvit import AiqvitOptions
from cptv_jax.methods.erq import ErqOptions
from cptv_jax.methods.ptq4vit import Ptq4VitOptions
from cptv_jax.methods.registry import METHODS
from cptv_jax.methods.repq_vit import RepqVitOptions
from cptv_jax.options import fields_of, flatten, options_of
from cptv_jax.search import STRATEGIES, EvolQ, Evosax, Generational, Guided

# A value for each field that differs from the default, as one would type it, and what it means.
SHARED: dict[str, tuple[str, Any]] = {
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
    "recipe.integer_layer_norm": ("false", False),
    "recipe.log_int_softmax": ("true", True),
    "recipe.quantize_input": ("false", False),
    "recipe.overrides": (
        "{*.fc1.weight: {bits: 4, bias_correction: false}, head.fc: null}",
        {"*.fc1.weight": {"bits": 4, "bias_correction": False}, "head.fc": None},
    ),
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
    "search.judge.objective": ("mse", "mse"),
    "search.judge.on": ("features", "features"),
    "search.judge.temperature": ("2", 2.0),
    "search.judge.teacher": ("published", "published"),
    "search.judge.images": ("200", 200),
    "search.judge.holdout": ("0", 0.0),
    "search.judge.patience": ("2", 2),
    "search.space.sites": ("[*.weight, head.fc]", ("*.weight", "head.fc")),
    "search.space.offsets": ("true", True),
    "search.space.rounding": ("false", False),
    "search.compute.arithmetic": ("bf16-codes", "bf16-codes"),
    "search.compute.race": ("true", True),
    "search.compute.memory_gib": ("1.5", 1.5),
    "search.compute.images_at_once": ("5", 5),
    "search.compute.candidates_at_once": ("2", 2),
    "search.compute.population_devices": ("2", 2),
    "search.compute.cache_gib": (".inf", float("inf")),
}
OWN: dict[str, dict[str, tuple[str, Any]]] = {
    "ptq4vit": {
        "images": ("64", 64),
        "metric": ("l2", "l2"),
        "alpha": ("1e-1", 0.1),
        "beta": ("1.5", 1.5),
        "candidates": ("50", 50),
        "rounds": ("2", 2),
        "softmax_form": ("published", "published"),
        "images_at_once": ("5", 5),
        "candidates_at_once": ("3", 3),
    },
    "repq-vit": {"images": ("64", 64), "round_zero_point": ("true", True)},
    "erq": {"images": ("64", 64), "coe": ("1e4", 1e4), "flips": ("0", 0), "round_zero_point": ("true", True)},
    "aiqvit": {
        "images": ("16", 16),
        "search_images": ("64", 64),
        "search_steps": ("0", 0),
        "ranks": ("[4, 8]", (4, 8)),
        "penalty": ("0.1", 0.1),
    },
    "evol-q": {
        "passes": ("3", 3),
        "rounds": ("2", 2),
        "population": ("5", 5),
        "samples": ("4", 4),
        "step": ("1e-4", 1e-4),
    },
    "generational": {
        "passes": ("3", 3),
        "rounds": ("2", 2),
        "children": ("4", 4),
        "survivors": ("1", 1),
        "sigma": ("5.e-2", 0.05),
    },
    "evosax": {
        "passes": ("3", 3),
        "rounds": ("2", 2),
        "children": ("4", 4),
        "algorithm": ("SNES", "SNES"),
        "sigma": ("5e-2", 0.05),
    },
    "guided": {
        "passes": ("3", 3),
        "rounds": ("2", 2),
        "children": ("4", 4),
        "sigma": ("5e-2", 0.05),
        "idle_stages": ("null", None),
        "steps": ("40", 40),
        "rate": ("5e-3", 5e-3),
        "batch": ("25", 25),
        "objective": ("cosine", "cosine"),
        "matching": ("2.5", 2.5),
        "mirror": ("false", False),
        "mixup": ("false", False),
    },
}  # fmt: skip
GUIDED = QuantizeConfig(search=SearchConfig(strategy=Guided()))  # whose candidates have offsets
CASES = [
    *((GUIDED, name, *typed) for name, typed in SHARED.items()),
    *(
        (QuantizeConfig(method=options), f"method.{field}", *typed)
        for options in (Ptq4VitOptions(), RepqVitOptions(), ErqOptions(), AiqvitOptions())
        for field, typed in OWN[options.name].items()
    ),
    *(
        (QuantizeConfig(search=SearchConfig(strategy=strategy())), f"search.strategy.{field}", *typed)
        for strategy in (EvolQ, Generational, Guided)
        for field, typed in OWN[strategy.name].items()
    ),
]
NEEDED = ("model", "--images", "images", "--out", "out")


def test_every_field_has_an_example_here() -> None:
    assert ["method", *SHARED] == [
        name for name in flags_of(QuantizeConfig()) if not name.startswith("search.strategy")
    ]
    for name, typed in OWN.items():
        thing: Any = METHODS[name].options if name in METHODS else STRATEGIES[name]
        assert list(typed) == [field.name for field in fields_of(thing)]
    own = {
        name for name, thing in [*METHODS.items(), *STRATEGIES.items()] if "cptv_jax" in options_of(thing).__module__
    }
    assert set(OWN) == own - {"fq-vit", "omse", "none"}  # which have no fields


@pytest.mark.parametrize(
    ("start", "name", "text", "value"), CASES, ids=[f"{i}-{case[1]}" for i, case in enumerate(CASES)]
)
def test_every_field_has_a_flag(start: QuantizeConfig, name: str, text: str, value: Any) -> None:
    given = getattr(parser_for(start).parse_args([*NEEDED, f"--{name}={text}"]), name)
    found = flatten(override(start, {name: given}))
    assert found == {**flatten(start), name: value}
    assert found[name] != flatten(start)[name] and type(found[name]) is type(value)


def test_fields_that_are_not_given_are_not_overridden() -> None:
    given = vars(parser_for(QuantizeConfig()).parse_args(NEEDED))
    assert not [name for name in flags_of(QuantizeConfig()) if name in given]


def test_flags_win_over_the_file(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("seed: 1\nsearch: {strategy: {name: evol-q, passes: 5, rounds: 4}}")
    start = choose(load_config(tmp_path / "c.yaml"), ["--search.strategy", "evol-q"])  # which it has: its fields stay
    config = override(start, {"search.strategy.passes": "2"})
    assert (config.seed, config.search.strategy) == (1, EvolQ(passes=2, rounds=4))


def test_a_strategy_or_method_of_another_name_begins_with_its_defaults(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("search: {strategy: {name: evol-q, passes: 5}}")
    words = ["--search.strategy=guided", "--method", "erq"]
    config = choose(load_config(tmp_path / "c.yaml"), words)
    assert (config.search.strategy, config.method) == (Guided(), ErqOptions())
    whole = choose(config, ["--search.strategy", "{name: evosax, sigma: 0.5}"]) if "evosax" in STRATEGIES else None
    assert whole is None or whole.search.strategy == Evosax(sigma=0.5)


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("search.strategy.passes", "1.5", "--search.strategy.passes is 1.5; it must be a whole number"),
        ("search.strategy.population", "null", "--search.strategy.population is None; it must be a whole number"),
        ("search.strategy.passes", "yes", "--search.strategy.passes is 'yes'; it must be a whole number"),
        ("search.judge.holdout", "some", "--search.judge.holdout is 'some'; it must be a number"),
        ("search.judge.images", "all", "--search.judge.images is 'all'; it must be a whole number"),
        ("search.space.sites", "[]", "--search.space.sites is []; it must be a list that is not empty"),
        ("search.space.sites", "[1]", "--search.space.sites.0 is 1; it must be text"),
        ("search.space.sites", "3", "--search.space.sites is 3; it must be a list"),
        ("recipe.overrides", "{", "--recipe.overrides is not valid YAML"),
        ("seed", "x", "--seed is 'x'; it must be a whole number"),
    ],
)
def test_values_of_the_wrong_type_are_refused_by_flag(name: str, text: str, says: str) -> None:
    with pytest.raises(InputError) as caught:
        override(QuantizeConfig(), {name: text})
    assert str(caught.value).startswith(says)


def test_an_unknown_name_is_refused_with_the_nearest() -> None:
    with pytest.raises(InputError, match=r"^--search.strategy is 'evolq'; did you mean 'evol-q'\?"):
        choose(QuantizeConfig(), ["--search.strategy", "evolq"])
    parser = parser_for(QuantizeConfig())
    with pytest.raises(InputError, match=r"unknown option --calibration.imags; did you mean '--calibration.images'\?"):
        parser.parse_args([*NEEDED, "--calibration.imags", "3"])


def test_a_flag_of_an_older_cptv_or_of_another_strategy_is_explained() -> None:
    assert (
        explain(QuantizeConfig(), "--search.gradient_steps")
        == ", which is of an older cptv; it is --search.strategy.steps now"
    )
    assert "an option of guided, not of evol-q; give --search.strategy" in str(
        explain(QuantizeConfig(), "--search.strategy.steps")
    )
    assert "an option of erq, not of fq-vit; give --method" in str(explain(QuantizeConfig(), "--method.flips"))
    assert explain(QuantizeConfig(), "--nothing") is None


def test_a_message_about_fields_is_spelled_in_flags() -> None:
    names = ["seed", "calibration.batch", "calibration.batches"]
    assert spell("seed is 3; set calibration.batch.", names) == "--seed is 3; set --calibration.batch."
    assert spell("c.yaml: the seed, --calibration.batch", names) == "c.yaml: the seed, --calibration.batch"


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("method", METHODS)
def test_the_help_has_a_sentence_for_every_flag_and_reads_well_in_eighty_columns(method: str, strategy: str) -> None:
    config = QuantizeConfig(method=method, search=SearchConfig(strategy=strategy))
    text = parser_for(config).format_help()
    assert max(map(len, text.splitlines())) <= 80
    flat = " ".join(text.split())
    for group in groups_of(config):
        assert re.search(rf"^{re.escape(group.title)}:$", text, re.MULTILINE) and group.summary in flat
        for flag in group.flags:
            assert re.search(rf"^  --{re.escape(flag.name)} [A-Z]+$", text, re.MULTILINE)
            assert flag.field.help.endswith(".") and "(" in flag.help and "default: " in flag.help
    assert f"choices: {', '.join(STRATEGIES)}; default: {strategy})" in flat


def test_the_help_shows_the_values_of_the_file_as_defaults() -> None:
    config = QuantizeConfig(search=SearchConfig(strategy=Guided(steps=77)))
    flat = " ".join(parser_for(config).format_help().split())
    assert "--search.strategy.steps N Optimizer steps per pass. (default: 77)" in flat
    assert "for the options of another, give --search.strategy NAME before --help" in flat
