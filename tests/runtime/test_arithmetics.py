"""What is measured of a backend is measured once, also where the first question comes under a trace."""

import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from cptv_jax.runtime import arithmetics
from cptv_jax.runtime.arithmetics import fastest_arithmetic, supported_arithmetics


def test_the_first_question_may_come_under_a_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = supported_arithmetics()
    arithmetics._measure_supported.cache_clear()
    arithmetics._measure_fastest.cache_clear()
    seen: list[str] = []

    @jax.jit
    def function(x: jax.Array) -> jax.Array:
        seen.append(fastest_arithmetic())
        return x + len(supported_arithmetics())

    assert function(jnp.float32(1)) == 1 + len(expected)
    assert supported_arithmetics() == expected and seen == [fastest_arithmetic()]


TESTS = Path(__file__).parent.parent
_FRESH = """
import jax, jax.numpy as jnp, numpy as np
import cptv_jax as cptv
from cptv_jax.calibration.statistics import calibrate
from cptv_jax.models.architecture import sites_of
from tiny_vit import TINY
model = cptv.Model(TINY, TINY.initialize(0))
recipe = cptv.resolve(cptv.RecipeConfig(preset="evol-q", weight_bits=4), sites_of(TINY))
x = jnp.asarray(np.random.default_rng(0).normal(size=(4, 32, 32, 3)), jnp.float32)
quantized = cptv.QuantizedModel(model, recipe, calibrate(model, [x], recipe))
inside = jax.jit(lambda x: cptv.forward(quantized.stages(), x).logits)(x)
np.testing.assert_allclose(inside, cptv.forward(quantized.stages(), x).logits, rtol=0, atol=1e-5)
"""


@pytest.mark.slow
def test_a_fresh_process_may_begin_with_a_quantized_model_inside_jit() -> None:
    child = subprocess.run(
        [sys.executable, "-c", "import sys; sys.path[:0] = sys.argv[1:]" + _FRESH, str(TESTS)],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert child.returncode == 0, child.stderr[-2000:]
