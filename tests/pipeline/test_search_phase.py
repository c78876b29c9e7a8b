"""The search phase: what a configuration comes to."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from cptv_jax import Model, QuantizeConfig, load_images, quantize
from cptv_jax.config.schema import CalibrationConfig, SearchConfig
from cptv_jax.demo import DIGITS_VIT
from cptv_jax.pipeline import judging as judging_module
from cptv_jax.pipeline import proposers
from cptv_jax.pipeline.search_phase import strategy_for
from cptv_jax.quantized.candidate import move_candidate
from cptv_jax.runtime.arithmetics import gradient_arithmetic
from cptv_jax.runtime.forward import array_of, forward
from cptv_jax.search import Descent, EvolQ, Evosax, Generational, Guided, Objective, channel_variances


@pytest.mark.parametrize(("bits", "step"), [(3, 1e-3), (4, 1e-3), (8, 1e-4)])
def test_the_published_strategy_steps_by_the_weights_width(bits: int, step: float) -> None:
    assert strategy_for(SearchConfig(), bits) == EvolQ(step, 15, 10, 3)
    assert strategy_for(SearchConfig(step=0.5, population=4, samples=2, rounds=1), bits) == EvolQ(0.5, 4, 2, 1)


def test_the_generational_strategy_takes_its_own_settings() -> None:
    config = SearchConfig(strategy="generational", sigma=0.5, children=7, survivors=3, rounds=4)
    assert strategy_for(config, 4) == Generational(0.5, 7, 3, 4)


def test_evosax_takes_its_algorithm() -> None:
    config = SearchConfig(strategy="evosax", algorithm="SNES", sigma=0.5, children=6, rounds=4)
    assert strategy_for(config, 4) == Evosax("SNES", 0.5, 6, 4)


def test_the_guided_strategy_takes_the_direction_of_the_proposal() -> None:
    config = SearchConfig(strategy="guided", sigma=0.5, children=7, rounds=4)
    direction = {"attn.qkv.weight": 0.1}
    assert strategy_for(config, 4, direction) == Guided(direction, move_candidate, 0.5, 7, 4)


@pytest.mark.slow
@pytest.mark.parametrize("mirror", [True, False])
def test_gradients_of_infonce_see_images_and_mirror_images_beside_the_teacher_and_kl_decides(
    monkeypatch: pytest.MonkeyPatch, mirror: bool
) -> None:
    model = Model(DIGITS_VIT, DIGITS_VIT.initialize(0))
    images = load_images("digits:calibration", DIGITS_VIT.preprocessing, labels=False, limit=24, seed=0)
    search = SearchConfig(
        strategy="guided",
        passes=1,
        gradient_steps=1,
        gradient_batch=4,
        gradient_matching=2,
        holdout=0.34,
        gradient_rate=0.02,
        mirror=mirror,
        mixup=not mirror,
    )
    config = QuantizeConfig(calibration=CalibrationConfig(24, 8), search=search)
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
    teacher = forward(model.stages(approximate=gradient_arithmetic() == "bf16-codes"), x)
    np.testing.assert_allclose(pair.teacher.logits, teacher.logits, rtol=1e-2, atol=1e-2)
    # Of all images (there are fewer than 100), not of the first batch; a program of its own rounds as above.
    variances = channel_variances(model.stages(), jnp.asarray(x[:16]), array_of)
    np.testing.assert_allclose(stages[0].state["variance"], variances[0], rtol=2e-2)
    assert np.all(pair.error > 0)
    expected = Objective()(pair.student, pair.teacher) + 2 * np.mean(pair.error) / (len(model.stages()) - 1)
    np.testing.assert_allclose(loss(pair), expected, rtol=1e-6)
