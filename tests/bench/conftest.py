"""A bench of one short run on a tiny model."""

from pathlib import Path

import pytest
from tiny_vit import TINY

from cptv_jax import Model, SearchConfig, save_model
from cptv_jax.bench.methods import Options
from cptv_jax.config.schema import JudgeConfig
from cptv_jax.search import Generational

SEARCH = SearchConfig(strategy=Generational(passes=1, rounds=1, children=4, sigma=0.1), judge=JudgeConfig(holdout=0.5))


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("bench") / "tiny"
    save_model(path, Model(TINY, TINY.initialize(0)))
    return str(path)


@pytest.fixture
def options(weights: str, tmp_path: Path) -> Options:
    return Options(
        weights, "digits:calibration", "digits:test", tmp_path / "out", methods=("fq-vit",), bits=("W4A8",),
        calibration=16, batch=8, held_out=12, search=SEARCH,
    )  # fmt: skip
