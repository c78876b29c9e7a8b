"""The search phase: what a configuration comes to."""

import pytest

from cptv_jax.config import SearchConfig
from cptv_jax.quantized import move_candidate
from cptv_jax.search import EvolQ, Generational, Guided
from cptv_jax.searching import strategy_for


@pytest.mark.parametrize(("bits", "step"), [(3, 1e-3), (4, 1e-3), (8, 1e-4)])
def test_the_published_strategy_steps_by_the_weights_width(bits: int, step: float) -> None:
    assert strategy_for(SearchConfig(), bits) == EvolQ(step, 15, 10, 3)
    assert strategy_for(SearchConfig(step=0.5, population=4, samples=2, rounds=1), bits) == EvolQ(0.5, 4, 2, 1)


def test_the_generational_strategy_takes_its_own_settings() -> None:
    config = SearchConfig(strategy="generational", sigma=0.5, children=7, survivors=3, rounds=4)
    assert strategy_for(config, 4) == Generational(0.5, 7, 3, 4)


def test_the_guided_strategy_takes_the_direction_of_the_proposal() -> None:
    config = SearchConfig(strategy="guided", sigma=0.5, children=7, rounds=4)
    direction = {"attn.qkv.weight": 0.1}
    assert strategy_for(config, 4, direction) == Guided(direction, move_candidate, 0.5, 7, 4)
