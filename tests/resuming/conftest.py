"""A tiny model and folders of digits, for runs that are stopped and begun again."""

from pathlib import Path

import pytest
from stopped_runs import DEEPER, tiny_model, write_digits
from tiny_vit import TINY

from cptv_jax import Model


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return write_digits(tmp_path_factory.mktemp("digits"))


@pytest.fixture(scope="module")
def model() -> Model:
    return tiny_model(DEEPER)


@pytest.fixture(scope="module")
def small_model() -> Model:
    return tiny_model(TINY)
