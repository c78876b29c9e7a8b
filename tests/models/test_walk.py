"""A walk over the stages: what it hands from stage to stage, and that stages of one kind share a program."""

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import PyTree

from cptv_jax.interpreters import Float, Tensor
from cptv_jax.models.architecture import Architecture
from cptv_jax.models.preprocessing import Preprocessing
from cptv_jax.models.vit import ViTConfig
from cptv_jax.models.vit_family import VIT
from cptv_jax.models.walk import Run, run_stages, visit_stage, walk
from cptv_jax.runtime.stages import Output

TINY = Architecture(
    "tiny", VIT, ViTConfig(image_size=16, patch_size=8, num_classes=5, width=8, depth=4, heads=2),
    Preprocessing(image_size=16),
)  # fmt: skip
WEIGHTS = TINY.initialize(0)


@dataclass(frozen=True)
class Total:
    """Runs in float; finds the sum of its input's values, times a factor. traced: how often it was traced."""

    name: str = ""
    traced: ClassVar[list[str]] = []

    def __call__(self, run: Run, x: PyTree, arrays: PyTree) -> tuple[PyTree, PyTree]:
        self.traced.append(self.name)
        return run(Float(), x), jnp.sum(x.values) * arrays


@pytest.fixture
def images() -> Tensor:
    return Tensor(jnp.asarray(np.random.default_rng(0).normal(size=(2, 16, 16, 3)), jnp.float32))


def test_each_stage_reads_what_the_one_before_it_gave(images: Tensor) -> None:
    factors = {stage: jnp.float32(2.0) for stage in TINY.stage_names}
    passed = list(walk(TINY, WEIGHTS, images, dict.fromkeys(TINY.stage_names, Total()), factors))
    assert [stage for stage, _, _ in passed] == ["embed", "blocks.0", "blocks.1", "blocks.2", "blocks.3", "head"]
    inputs = [images, *(output for _, output, _ in passed[:-1])]
    for x, (_, _, found) in zip(inputs, passed, strict=True):
        np.testing.assert_allclose(found, 2 * np.sum(np.float64(x.values)), rtol=1e-4)  # a float32 sum of 1536 terms
    output = passed[-1][1]
    assert isinstance(output, Output)
    expected = jax.jit(lambda weights, x: run_stages(TINY, weights, Float(), x))(WEIGHTS, images)
    # Compiled as one program or as six: sums of at most 192 terms may be taken in another order.
    np.testing.assert_allclose(output.logits, expected.logits, rtol=1e-5, atol=1e-6)


def test_stages_that_are_built_alike_share_a_compiled_program(images: Tensor) -> None:
    factors = {stage: jnp.float32(i) for i, stage in enumerate(TINY.stage_names)}
    for _ in range(2):
        list(walk(TINY, WEIGHTS, images, dict.fromkeys(TINY.stage_names, Total("shared")), factors))
    # Blocks 0 to 2 are one kind; the last one computes the class token alone.
    assert Total.traced.count("shared") == len(("embed", "blocks.0", "blocks.3", "head"))


def test_a_stage_can_be_fed_something_else(images: Tensor) -> None:
    factors = {stage: jnp.float32(1.0) for stage in TINY.stage_names}
    visits = dict.fromkeys(TINY.stage_names, Total())
    zeros = Tensor(jnp.zeros((2, 5, 8)))
    found = {stage: total for stage, _, total in walk(TINY, WEIGHTS, images, visits, factors, {"blocks.2": zeros})}
    assert found["blocks.2"] == 0.0 and found["blocks.1"] != 0.0 and found["blocks.3"] != 0.0


def test_one_stage_can_be_visited_alone(images: Tensor) -> None:
    output, found = visit_stage(TINY, WEIGHTS, "embed", Total(), images, jnp.float32(0.0))
    assert output.shape == (2, 5, 8) and found == 0.0
