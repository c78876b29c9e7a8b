"""The figures of a quantization: which pass is the result, what changed, how large the weights are."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_vit import TINY

from cptv_jax import Model, QuantizeConfig, QuantizedModel, RecipeConfig, resolve
from cptv_jax.methods.registry import METHODS
from cptv_jax.models.architecture import sites_of
from cptv_jax.pipeline.outcome import Quantization
from cptv_jax.quantizers import Uniform
from cptv_jax.report.summary import Change, changes, summarize, weight_bytes
from cptv_jax.search.events import Accepted, PassEnd, Proposed, Start

SITE = "blocks.0.attn.qkv.weight"


@pytest.fixture(scope="module")
def base() -> QuantizedModel:
    model = Model(TINY, TINY.initialize(0))
    recipe = resolve(RecipeConfig(preset="omse", weight_bits=4), sites_of(TINY))
    images = jax.random.normal(jax.random.key(0), (4, 32, 32, 3))
    return METHODS["omse"].quantize(model, [images], recipe, jax.random.key(0))


def outcome(base: QuantizedModel, *losses: float | None) -> Quantization:
    """With these held-out losses of the start and the passes."""
    first, *rest = losses
    log: list[Any] = [Start(9.0, first), Proposed(1, 0.5, 8.0), Accepted(1, "all", 0, 8.0)]
    log += [PassEnd(number, 8.0 - number, loss, 10 * number) for number, loss in enumerate(rest, 1)]
    return Quantization(base, base, base.model, QuantizeConfig(), tuple(log))


@pytest.mark.parametrize(
    ("losses", "kept"),
    [((3.0, 1.0, 2.0), 1), ((1.0, 2.0, 3.0), 0), ((2.0, 1.0, 1.0), 1), ((None, None, None), 2)],
)
def test_the_pass_that_is_kept_is_that_of_the_search(base: QuantizedModel, losses: Any, kept: int) -> None:
    found = summarize(outcome(base, *losses))
    assert found.kept is not None and found.kept.number == kept
    assert [row.name for row in found.passes] == ["base method", "pass 1", "pass 2"]
    assert (found.accepted, found.proposals, found.evaluations) == (1, 1, 20)


def test_without_a_search_nothing_is_kept(base: QuantizedModel) -> None:
    found = summarize(replace(outcome(base, 1.0), log=()))
    assert (found.kept, found.passes, found.evaluations, found.changes) == (None, (), 0, ())


def test_what_changed_is_counted_by_kind(base: QuantizedModel) -> None:
    quantizer, layer = base.quantizers[SITE], base.model.layer("blocks.0.attn.qkv")
    kernel = layer["kernel"]
    assert changes(base, base) == () and isinstance(quantizer, Uniform)
    scaled = quantizer.with_scale(quantizer.scale.at[:3].multiply(1.5))
    found = changes(base, replace(base, quantizers={**base.quantizers, SITE: scaled}))
    assert [(one.kind, one.changed) for one in found] == [("scales", 3)]
    # A rounding counts where a code changes: a whole step up does so, if it is not clipped, and a nudge hardly does.
    inside = (quantizer.codes(kernel) > quantizer.low) & (quantizer.codes(kernel) < quantizer.high)
    turned = replace(quantizer, rounding=jnp.zeros(kernel.shape).at[0].set(1.0))
    (found_one,) = changes(base, replace(base, quantizers={**base.quantizers, SITE: turned}))
    assert found_one.kind == "roundings of weights"
    assert int(inside[0].sum()) <= found_one.changed <= kernel.shape[1]
    moved = base.model.with_layers({"blocks.0.attn.qkv": {"bias": layer["bias"] + 1}})
    biases = sum(
        leaf.size for path, leaf in jax.tree_util.tree_leaves_with_path(moved.weights) if "bias" in str(path[-1])
    )
    assert changes(base, replace(base, model=moved)) == (Change("biases", layer["bias"].size, biases),)


def test_bytes_are_those_of_codes_and_of_parameters(base: QuantizedModel) -> None:
    packed, plain = weight_bytes(base)
    weights = [site for site in sites_of(TINY) if site.role == "weight"]
    kernels = {site.name: base.model.layer(site.layer_name)["kernel"] for site in weights}
    assert plain == 4 * sum(kernel.size for kernel in kernels.values())
    codes = sum(-(-kernel.size * base.recipe.sites[name].bits // 8) for name, kernel in kernels.items())
    grids: list[Any] = [base.quantizers[name] for name in kernels]
    assert packed == codes + 4 * sum(np.size(grid.scale) + np.size(grid.zero_point) for grid in grids)
