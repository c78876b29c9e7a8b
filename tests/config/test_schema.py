"""The configuration: options that belong to who uses them, refused where they are wrong, from Python as from YAML."""

import re
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from cptv_jax import CalibrationConfig, InputError, QuantizeConfig, RecipeConfig, SearchConfig, load_config, resolve
from cptv_jax.config.loading import config_from
from cptv_jax.config.schema import ComputeConfig, JudgeConfig, SpaceConfig, judging_objective
from cptv_jax.methods.aiqvit import AiqvitOptions
from cptv_jax.methods.erq import ErqOptions
from cptv_jax.methods.ptq4vit import Ptq4VitOptions
from cptv_jax.methods.registry import METHODS
from cptv_jax.models.architecture import sites_of
from cptv_jax.models.zoo import ZOO
from cptv_jax.options import to_mapping
from cptv_jax.pipeline.plan import judging_batches
from cptv_jax.reconstruction.config import ReconstructionConfig
from cptv_jax.search import STRATEGIES, EvolQ, Generational, Gradients, Guided, NoSearch

CONFIGS = sorted((Path(__file__).resolve().parents[2] / "configs").glob("*.yaml"))
CHANGED = QuantizeConfig(
    method=AiqvitOptions(ranks=(4, 8)),
    seed=7,
    recipe=RecipeConfig(weight_bits=3, overrides={"*.fc1.weight": {"bits": 4}, "head.fc": None}),
    calibration=CalibrationConfig(32, 16),
    reconstruction=ReconstructionConfig(steps=5, weight_rate=1e-5),
    search=SearchConfig(
        strategy=Guided(steps=40, objective="kl+cosine"),
        judge=JudgeConfig(on="features", temperature=2.0, patience=2),
        space=SpaceConfig(sites=("*.weight", "head.fc"), rounding=False),
        compute=ComputeConfig(race=True, cache_gib=float("inf")),
    ),
)


@pytest.mark.parametrize("config", [QuantizeConfig(), CHANGED], ids=["defaults", "changed"])
def test_yaml_and_back_is_the_same_configuration(config: QuantizeConfig, tmp_path: Path) -> None:
    text = yaml.safe_dump(to_mapping(config), sort_keys=False)
    (tmp_path / "c.yaml").write_text(text)
    again = load_config(str(tmp_path / "c.yaml"))
    assert again == config
    assert yaml.safe_dump(to_mapping(again), sort_keys=False) == text


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ({"seed": -1}, "seed is -1; it must be at least 0"),
        ({"seed": 2**32}, "seed is 4294967296; it must be below 4294967296"),
        ({"calibration": {"images": 0}}, "calibration.images is 0; it must be at least 1"),
        ({"calibration": {"batch": 0}}, "calibration.batch is 0; it must be at least 1"),
        ({"calibration": {"imags": 3}}, "unknown field 'calibration.imags'; did you mean 'images'?"),
        ({"metod": "erq"}, "unknown field 'metod'; did you mean 'method'?"),
        ({"method": 8}, "method must be a base method, or a mapping with its name"),
        ({"method": "er"}, "method is 'er'; did you mean 'erq'?"),
        ({"method": ["erq"]}, "method must be a base method, or a mapping with its name"),
        ({"method": {"name": ["erq"]}}, "method is '['erq']'"),
        ({"method": {"name": "erq", "flip": 3}}, "unknown field 'method.flip'; did you mean 'flips'?"),
        ({"method": {"name": "fq-vit", "flips": 3}}, "unknown field 'method.flips'"),
        ({"method": {"name": "ptq4vit", "metric": "l3"}}, "method.metric is 'l3'; known: cosine, hessian, l2"),
        ({"method": {"name": "ptq4vit", "softmax_form": "x"}}, "method.softmax_form is 'x'"),
        ({"recipe": {"weight_bits": "4"}}, "recipe.weight_bits is '4'; it must be a whole number"),
        ({"recipe": {"weight_bits": 9}}, "recipe.weight_bits is 9; it must be at most 8"),
        ({"recipe": {"weight_signed": 1}}, "recipe.weight_signed is 1; it must be true or false"),
        ({"recipe": {"overrides": ["a"]}}, "recipe.overrides is ['a']; it must be a mapping"),
        ({"reconstruction": {"importance": "fischer"}}, "reconstruction.importance is 'fischer'; did you mean"),
        ({"reconstruction": {"float_input": 1.5}}, "reconstruction.float_input is 1.5; it must be at most 1"),
        ({"search": None}, "search is None; it must be a mapping of fields"),
        ({"search": {"strategy": "evolq"}}, "search.strategy is 'evolq'; did you mean 'evol-q'?"),
        ({"search": {"strategy": {"passes": 3}}}, "search.strategy must be a strategy, or a mapping with its name"),
        ({"search": {"strategy": {"name": "evol-q", "passes": 1.5}}}, "search.strategy.passes is 1.5; it must be a"),
        ({"search": {"strategy": {"name": "evol-q", "steps": 3}}}, "unknown field 'search.strategy.steps'"),
        ({"search": {"strategy": {"name": "guided", "objective": "infonse"}}}, "search.strategy.objective is 'infons"),
        ({"search": {"judge": {"objective": "kl+x"}}}, "search.judge.objective is 'kl+x'"),
        ({"search": {"judge": {"teacher": "flaot"}}}, "search.judge.teacher is 'flaot'; did you mean 'float'?"),
        ({"search": {"judge": {"holdout": 1.0}}}, "search.judge.holdout is 1.0; it must be below 1"),
        ({"search": {"judge": {"holdout": float("nan")}}}, "search.judge.holdout is nan; it must be"),
        ({"search": {"judge": {"holdout": True}}}, "search.judge.holdout is True; it must be a number"),
        ({"search": {"space": {"sites": []}}}, "search.space.sites is []"),
        ({"search": {"space": {"sites": [1]}}}, "search.space.sites.0 is 1; it must be text"),
        ({"search": {"space": {"offsets": True}}}, "search.space.offsets is true, but the steps of evol-q"),
        (
            {"search": {"strategy": "guided", "space": {"offsets": False, "rounding": True}}},
            "search.space.rounding is true, but search.space.offsets false",
        ),
        ({"search": {"compute": {"arithmetic": "int3"}}}, "search.compute.arithmetic is 'int3'"),
        ({"search": {"compute": {"memory_gib": float("inf")}}}, "search.compute.memory_gib is inf; it must be a"),
        ({"calibration": {"batch": 1}}, "calibration.batch is 1, but search.judge.objective infonce contrasts"),
        ([], "the configuration must be a mapping of fields"),
        ({3: 3}, "a field is called 3; names of fields are text"),
    ],
)  # fmt: skip
def test_what_no_run_can_use_is_refused_by_name(data: Any, says: str) -> None:
    with pytest.raises(InputError) as caught:
        config_from(data, "c.yaml")
    assert str(caught.value).startswith(f"c.yaml: {says}")


@pytest.mark.parametrize(
    ("build", "says"),
    [
        (lambda: SearchConfig(strategy="evolq"), "strategy is 'evolq'; did you mean 'evol-q'?"),
        (lambda: SearchConfig("evolq"), "strategy is 'evolq'; did you mean 'evol-q'?"),
        (lambda: JudgeConfig(teacher="publishd"), "teacher is 'publishd'; did you mean 'published'?"),  # type: ignore[arg-type]
        (lambda: Ptq4VitOptions(metric="hesian"), "metric is 'hesian'; did you mean 'hessian'?"),  # type: ignore[arg-type]
        (lambda: Ptq4VitOptions(softmax_form="pice"), "softmax_form is 'pice'"),  # type: ignore[arg-type]
        (lambda: ReconstructionConfig(importance="fischer"), "importance is 'fischer'; did you mean 'fisher'?"),  # type: ignore[arg-type]
        (lambda: EvolQ(passes="3"), "passes is '3'; it must be a whole number"),  # type: ignore[arg-type]
        (lambda: RecipeConfig(weight_bits="4"), "weight_bits is '4'; it must be a whole number"),  # type: ignore[arg-type]
        (lambda: CalibrationConfig("4"), "images is '4'; it must be a whole number"),  # type: ignore[arg-type]
        (lambda: AiqvitOptions(ranks=(0, 4)), "ranks.0 is 0; it must be at least 1"),
        (lambda: AiqvitOptions(ranks=()), "ranks is (); it must be a list that is not empty"),
        (lambda: ErqOptions(coe=float("inf")), "coe is inf; it must be a finite number"),
        (lambda: SearchConfig(judge={"objective": "kl"}), "judge is {'objective': 'kl'}; it must be a JudgeConfig"),  # type: ignore[arg-type]
        (lambda: QuantizeConfig(search=SearchConfig(), method="erc"), "method is 'erc'; did you mean 'erq'?"),
        (lambda: replace(Guided(), steps=0), "steps is 0; it must be at least 1"),
    ],
)
def test_a_wrong_word_or_type_is_refused_from_python_too(build: Any, says: str) -> None:
    with pytest.raises(InputError) as caught:
        build()
    assert str(caught.value).startswith(says)


def test_a_name_stands_for_its_options_in_python_too() -> None:
    assert QuantizeConfig(method="erq", search=SearchConfig(strategy="guided")) == QuantizeConfig(
        method=ErqOptions(), search=SearchConfig(strategy=Guided())
    )


@pytest.mark.parametrize("seed", [0, 2**32 - 1])
def test_the_seeds_that_are_allowed_work(seed: int) -> None:
    import jax
    import numpy as np

    QuantizeConfig(seed=seed)
    jax.random.key(seed)
    np.random.default_rng([seed, 1])


def test_every_method_and_strategy_is_called_what_its_options_say() -> None:
    assert [method.options.name for method in METHODS.values()] == list(METHODS)
    assert [strategy.name for strategy in STRATEGIES.values()] == list(STRATEGIES)


@pytest.mark.parametrize("path", CONFIGS, ids=[path.stem for path in CONFIGS])
def test_the_configurations_that_we_ship_are_valid(path: Path) -> None:
    config = load_config(str(path))
    recipe = resolve(config.recipe, sites_of(ZOO["deit_tiny_patch16_224"]))
    bits = re.search(r"_w(\d+)a(\d+)$", path.stem)
    if bits:
        assert (config.recipe.weight_bits, config.recipe.activation_bits) == (int(bits[1]), int(bits[2]))
        assert recipe.sites["blocks.0.attn.qkv.weight"].bits == int(bits[1])


def test_there_are_configurations_to_ship() -> None:
    assert {"evol-q_w3a8", "evol-q_w4a8", "evol-q_w8a8", "fq-vit"} <= {path.stem for path in CONFIGS}


def test_the_recipe_in_a_mapping_is_plain_data() -> None:
    recipe, search = RecipeConfig(overrides={"head.fc": {"bits": 4}}), SearchConfig(space=SpaceConfig("*.weight"))  # type: ignore[arg-type]
    config = QuantizeConfig(recipe=recipe, search=search)
    assert to_mapping(config)["recipe"] == asdict(config.recipe)
    assert to_mapping(config)["search"]["space"]["sites"] == ["*.weight"]


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("evol-q", (10, 3, 1)),
        ("generational", (10, 3, 8)),
        ("evosax", (10, 3, 8)),
        ("guided", (1, 1, 3)),
        ("none", (0, 0, 0)),
    ],
)
def test_a_search_does_what_its_strategy_needs_unless_told(name: str, wanted: tuple[int, int, int]) -> None:
    strategy = SearchConfig(strategy=name).strategy
    assert (strategy.passes, strategy.rounds, strategy.candidates if strategy.passes else 0) == wanted


@pytest.mark.parametrize(
    ("search", "batch", "available", "wanted"),
    [
        (SearchConfig(), 100, 9, 9),
        (SearchConfig(judge=JudgeConfig(images=300)), 100, 9, 3),
        (SearchConfig(strategy=Guided()), 100, 9, 2),
        (SearchConfig(strategy=Guided()), 32, 3, 3),
        (SearchConfig(strategy=Guided()), 500, 2, 1),
        (SearchConfig(strategy=Guided(), judge=JudgeConfig(images=800)), 100, 9, 8),
    ],
)
def test_guided_judges_on_some_of_the_images_unless_told(
    search: SearchConfig, batch: int, available: int, wanted: int
) -> None:
    assert judging_batches(search, batch, available) == wanted


def test_judging_images_that_are_no_whole_batches_are_refused() -> None:
    search = SearchConfig(judge=JudgeConfig(images=250))
    with pytest.raises(InputError, match=r"judge.images is 250, which are no whole batches of 100; set it to 200"):
        judging_batches(search, 100, 9)
    with pytest.raises(InputError, match=r"search.judge.images is 250; it must lie between 100 \(a batch\) and 200"):
        judging_batches(search, 100, 2)


@pytest.mark.parametrize(
    ("search", "judging", "proposing"),
    [
        (SearchConfig(), "infonce", None),  # as published
        (SearchConfig(strategy=Guided()), "kl", "infonce"),
        (SearchConfig(strategy=Guided(), judge=JudgeConfig(objective="mse")), "mse", "mse"),
        (SearchConfig(strategy=Guided(objective="mse")), "kl", "mse"),
        (SearchConfig(strategy=Guided(objective="mse"), judge=JudgeConfig(objective="cosine")), "cosine", "mse"),
        (SearchConfig(strategy=Generational(), judge=JudgeConfig(objective="mse")), "mse", None),
    ],
)
def test_what_is_differentiated_follows_the_objective_where_one_is_named(
    search: SearchConfig, judging: str, proposing: str | None
) -> None:
    asked = search.strategy.complete(search.judge.objective).proposers()
    assert judging_objective(search).name == judging
    assert [one.objective for one in asked if isinstance(one, Gradients)] == ([proposing] if proposing else [])
    both = replace(search, judge=replace(search.judge, on="features", temperature=2.0))
    assert (judging_objective(both).on, judging_objective(both).temperature) == ("features", 2.0)


def test_no_search_needs_no_contrast() -> None:
    QuantizeConfig(calibration=CalibrationConfig(4, 1), search=SearchConfig(strategy=NoSearch()))
