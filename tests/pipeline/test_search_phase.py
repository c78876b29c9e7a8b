"""The search phase: what a configuration is resolved to."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cptv_jax import Model, QuantizeConfig, RecipeConfig, load_images, quantize
from cptv_jax.config.schema import CalibrationConfig, JudgeConfig, SearchConfig
from cptv_jax.demo import DIGITS_VIT
from cptv_jax.pipeline import judging as judging_module
from cptv_jax.pipeline import proposers
from cptv_jax.pipeline.plan import make_plan
from cptv_jax.pipeline.search_phase import Meter
from cptv_jax.quantized.execution import FullPrecision
from cptv_jax.runtime.arithmetics import gradient_arithmetic
from cptv_jax.runtime.forward import array_of, forward
from cptv_jax.search import Descent, Guided, NoSearch, Objective, channel_variances
from cptv_jax.search.loop import Search
from cptv_jax.search.state import SearchState


def small(**fields: Any) -> tuple[Model, Any, QuantizeConfig]:
    """A model of digits, 24 calibration images, and a configuration of three batches."""
    model = Model(DIGITS_VIT, DIGITS_VIT.initialize(0))
    images = load_images("digits:calibration", DIGITS_VIT.preprocessing, labels=False, limit=24, seed=0)
    return model, images, QuantizeConfig(calibration=CalibrationConfig(24, 8), **fields)


def test_a_plan_leaves_nothing_open() -> None:
    model, images, config = small(search=SearchConfig(strategy=Guided()))
    plan = make_plan(model, images, config)
    search = plan.search
    assert search is not None and search.objective == Objective("kl")
    assert search.strategy == Guided(objective="infonce")
    assert search.space.offsets and search.space.rounding
    assert search.space.sites == {name for name in plan.recipe.sites if name.endswith(".weight")}
    assert search.widths["blocks.0"] == (8, 8, 8, 8) and search.widths["head"] == (8,)
    resolved = plan.config.search
    assert (resolved.judge.objective, resolved.judge.images, resolved.space.sites) == ("kl", 16, ("*.weight",))
    assert plan.config.recipe.preset == "evol-q" and plan.reconstruction.steps == 0 and plan.notes == ()
    # What is resolved resolves to itself.
    again = make_plan(model, images, plan.config)
    assert again.config == plan.config and again.search is not None
    assert (again.search.objective, again.search.strategy) == (search.objective, search.strategy)


def test_the_published_search_is_of_attention_weights_and_their_widths() -> None:
    model, images, config = small(recipe=RecipeConfig(overrides={"blocks.1.attn.proj.weight": {"bits": 3}}))
    search = make_plan(model, images, config).search
    assert search is not None and (search.space.offsets, search.space.rounding) == (False, False)
    assert len(search.space.sites) == 2 * DIGITS_VIT.config.depth
    assert (search.widths["blocks.0"], search.widths["blocks.1"], search.widths["head"]) == ((8, 8), (8, 3), ())


def test_without_a_search_there_is_no_plan_of_one_and_nothing_is_held_out() -> None:
    model, images, config = small(search=SearchConfig(strategy=NoSearch()))
    plan = make_plan(model, images, config)
    assert plan.search is None and not plan.split.held_out and len(plan.split.calibration) == 3


def test_what_is_asked_for_and_not_given_is_noted() -> None:
    model, images, config = small(recipe=RecipeConfig(power_of_two_factor=False))
    config = replace(config, calibration=CalibrationConfig(23, 8))
    leftover, layer_norm = make_plan(model, images, config).notes
    assert leftover == "7 of the 23 calibration images asked for make no whole batch of 8 and are not used."
    assert layer_norm.startswith("LayerNorm runs in float arithmetic: preset evol-q asks for integer arithmetic")
    said = replace(config, recipe=replace(config.recipe, integer_layer_norm=False))
    assert make_plan(model, images, said).notes == (leftover,)


class Bar:
    """A progress bar that only counts."""

    def __init__(self) -> None:
        self.total, self.n = 0, 0

    def update(self, steps: int) -> None:
        self.n += steps

    def set_postfix_str(self, text: str) -> None:
        self.text = text


def test_the_bar_is_full_at_the_end_of_every_pass_also_where_that_ends_early() -> None:
    class Optimizer:
        every_pass, steps = True, 40

    strategy = Guided(passes=2, rounds=2, children=3)
    search, shown = Search(strategy, jax.random.key(0), [Optimizer()]), Bar()  # type: ignore[list-item]
    meter = Meter(search, 5, shown)
    a_pass = 40 + 5 * 2 * 3
    assert shown.total == 2 * a_pass
    state = SearchState({})
    meter.place(state)
    for _ in range(40):
        meter.count("gradient", 1)
    meter.count("rounding", 0)
    meter.place(replace(state, proposed=1))
    assert shown.n == 40
    meter.count("blocks.3", 3)
    meter.place(replace(state, proposed=1, position=1))
    assert shown.n == 40 + 6
    meter.place(replace(state, pass_index=1))  # the pass ended after one stage of five
    assert shown.n == a_pass
    meter.place(replace(state, pass_index=1, progress={"done": np.int32(25)}))  # as where it is resumed
    assert shown.n == a_pass + 25
    meter.finish()
    assert shown.n == shown.total


@pytest.mark.slow
@pytest.mark.parametrize("mirror", [True, False])
def test_gradients_of_infonce_see_images_and_mirror_images_beside_the_teacher_and_kl_decides(
    monkeypatch: pytest.MonkeyPatch, mirror: bool
) -> None:
    strategy = Guided(passes=1, steps=1, batch=4, matching=2, rate=0.02, mirror=mirror, mixup=not mirror)
    model, images, config = small(search=SearchConfig(strategy=strategy, judge=JudgeConfig(holdout=0.34)))
    given: list[Any] = []
    judged: list[Any] = []
    evaluator = judging_module.Evaluator

    def judging(*arguments: Any, **options: Any) -> Any:
        judged.extend(arguments)
        return evaluator(*arguments, **options)

    class Stopped(Exception):
        pass

    def proposer(*arguments: Any) -> None:
        given.extend(arguments)
        raise Stopped

    monkeypatch.setattr(proposers, "GradientProposer", proposer)
    monkeypatch.setattr(judging_module, "Evaluator", judging)
    with pytest.raises(Stopped):
        quantize(model, images, config)
    assert Objective("kl") in judged
    stages, read, count, loss, descent, *_ = given
    assert descent == Descent(steps=1, rate=0.02, batch=4, passes=1, mixup=not mirror)
    assert count == (32 if mirror else 16)  # of three batches of 8 one is held out
    x = read(np.arange(count))
    np.testing.assert_array_equal(x[16:], x[:16, :, ::-1] if mirror else x[:0])
    pair = forward(stages, jnp.asarray(x))
    # Programs that sum in another order may round a product's operand to another bfloat16, 2^-8 of it away.
    teacher = forward(model.stages(FullPrecision(gradient_arithmetic() == "bf16-codes")), x)
    np.testing.assert_allclose(pair.teacher.logits, teacher.logits, rtol=1e-2, atol=1e-2)
    # Of all images (there are fewer than 100), not of the first batch; a program of its own rounds as above.
    variances = channel_variances(model.stages(), jnp.asarray(x[:16]), array_of)
    np.testing.assert_allclose(stages[0].state["variance"], variances[0], rtol=2e-2)
    assert np.all(pair.error > 0)
    expected = Objective()(pair.student, pair.teacher) + 2 * np.mean(pair.error) / (len(model.stages()) - 1)
    np.testing.assert_allclose(loss(pair), expected, rtol=1e-6)
