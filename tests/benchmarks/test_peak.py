"""The work that the benchmarks count is the work that the models do."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from benchmarks.peak import matmul_flops
from cptv_jax.models.architecture import Architecture
from cptv_jax.models.preprocessing import Preprocessing
from cptv_jax.models.vit import ViTConfig
from cptv_jax.models.vit_family import VIT
from cptv_jax.quantized.model import Model


def _multiplications(function: Any, *arguments: Any) -> tuple[int, Any]:
    """Twice the multiply-adds of every dot_general in a function, and the shapes of its result."""
    jaxpr, shapes = jax.make_jaxpr(function, return_shape=True)(*arguments)
    flops = 0
    for equation in jaxpr.jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            inner = math.prod(equation.invars[0].aval.shape[axis] for axis in contracted)
            flops += 2 * inner * math.prod(equation.outvars[0].aval.shape)
    return flops, shapes


@pytest.mark.parametrize("distilled", [False, True])
def test_flops_are_those_of_the_traced_matmuls(distilled: bool) -> None:
    config = ViTConfig(image_size=32, patch_size=8, num_classes=10, width=16, depth=3, heads=2, distilled=distilled)
    architecture = Architecture("small", VIT, config, Preprocessing(image_size=32))
    counted = matmul_flops(config)
    # The last block computes the queries of all tokens in one matmul with keys and values; only those read are counted.
    unread = config.num_tokens - (2 if distilled else 1)
    counted["blocks.2"] += 2 * unread * config.width**2
    x: Any = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    for stage in Model(architecture, architecture.initialize(0)).stages():
        flops, x = _multiplications(stage.function, stage.state, x)
        assert flops == counted[stage.name], stage.name
