"""Block reconstruction: what it learns lowers every stage's error, and leaves an ordinary quantized model."""

import os
import subprocess
import sys
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_vit import images, recipe_of, small_model

from cptv_jax.interpreters import Tensor
from cptv_jax.methods.registry import METHODS
from cptv_jax.quantized.candidate import Space
from cptv_jax.quantized.model import QuantizedModel
from cptv_jax.quantizers import DualUniform, Uniform
from cptv_jax.reconstruction.blocks import _draw_batches, reconstruct
from cptv_jax.reconstruction.importance import output_importance
from cptv_jax.reconstruction.training import (
    ReconstructionConfig,
    bind_learned,
    make_learnable,
    make_optimizer,
    mix_inputs,
    train_step_program,
)
from cptv_jax.runtime.forward import array_of, forward, stage_inputs
from cptv_jax.storage.models import load_model, save_model

CONFIG = ReconstructionConfig(steps=40, batch=16)
BASES: dict[str, dict[str, Any]] = {
    "omse": {"preset": "omse", "weight_bits": 3, "activation_bits": 4},
    "fq-vit": {"preset": "evol-q", "weight_bits": 3, "activation_bits": 8},
    "log-int-softmax": {"preset": "fq-vit", "weight_bits": 3, "activation_bits": 8},
}
KEY = jax.random.key(0)


@lru_cache
def base_of(folder: Path, name: str) -> QuantizedModel:
    return METHODS["fq-vit"].quantize(small_model(folder), [images(folder)[:64]], recipe_of(**BASES[name]), KEY)


@lru_cache
def learned(folder: Path, name: str) -> tuple[QuantizedModel, list[tuple[float, float]]]:
    errors: list[tuple[float, float]] = []
    model = reconstruct(
        small_model(folder), base_of(folder, name), images(folder)[:64], CONFIG, KEY,
        on_stage=lambda index, model, before, after: errors.append((before, after)),
    )  # fmt: skip
    return model, errors


def arrays(model: QuantizedModel) -> list[np.ndarray]:
    return [np.asarray(leaf) for leaf in jax.tree.leaves([model.model.weights, dict(model.quantizers)])]


def logit_error(folder: Path, model: QuantizedModel) -> float:
    """On images that calibration and reconstruction have not seen."""
    some = images(folder)[64:]
    expected = forward(small_model(folder).stages(), some).logits
    return float(np.mean((forward(model.stages(), some).logits - expected) ** 2))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["omse", "fq-vit"])
def test_every_base_improves_stage_by_stage_and_on_images_it_has_not_seen(golden: Path, name: str) -> None:
    model, errors = learned(golden, name)
    assert all(after <= before for before, after in errors)
    assert all(after < 0.8 * before for before, after in errors[1:4])  # the blocks
    assert logit_error(golden, model) < 0.8 * logit_error(golden, base_of(golden, name))


@pytest.mark.slow
def test_the_result_is_an_ordinary_quantized_model(golden: Path, tmp_path: Path) -> None:
    model, _ = learned(golden, "omse")
    base, some = base_of(golden, "omse"), images(golden)[64:80]
    assert model.recipe == base.recipe
    for site, quantizer in model.quantizers.items():
        assert type(quantizer) is Uniform
        plain = replace(quantizer, rounding=None)
        assert jax.tree.map(jnp.shape, plain) == jax.tree.map(jnp.shape, base.quantizers[site]), site
        assert np.all(np.asarray(quantizer.scale) > 0), site
        zero_point = np.asarray(quantizer.zero_point)
        np.testing.assert_array_equal(zero_point, np.round(zero_point), err_msg=site)
        assert np.all((zero_point >= quantizer.low) & (zero_point <= quantizer.high)), site
    save_model(tmp_path / "saved", model)
    again = load_model(str(tmp_path / "saved"))
    assert isinstance(again, QuantizedModel)
    expected = forward(model.stages(), some).logits
    np.testing.assert_array_equal(forward(again.stages(), some).logits, expected)
    # A search goes on from what was learned.
    site = "blocks.1.attn.qkv.weight"
    stage = model.stage("blocks.1", space=Space([site], offsets=True, rounding=True))
    start, quantizer = stage.candidate["attn.qkv.weight"], model.quantizers[site]
    assert isinstance(quantizer, Uniform)
    np.testing.assert_array_equal(2 * start.rounding, quantizer.rounding)
    assert np.any(start.rounding)
    np.testing.assert_array_equal(
        model.model.layer("blocks.1.attn.qkv")["kernel"], base.model.layer("blocks.1.attn.qkv")["kernel"]
    )
    moved = model.with_candidates({"blocks.1": {"attn.qkv.weight": replace(start, scale=start.scale * 1.3)}})
    assert np.any(forward(moved.stages(), some).logits != expected)


def test_what_is_learned_is_what_the_ordinary_quantizer_makes_of_it(golden: Path) -> None:
    base = base_of(golden, "omse")
    _, bind, before, parameters = make_learnable(base, "blocks.0", CONFIG)
    rng = np.random.default_rng(0)
    # Steps as large as 30 of the rates' units would be without rates: a third of a code, of a step.
    parameters = jax.tree.map(
        lambda a, unit: jnp.asarray(0.3 * rng.standard_normal(a.shape) * unit, jnp.float32), parameters, before.units
    )
    state = bind_learned(bind, before, parameters)
    kernel, site = before.state["weights"]["mlp"]["fc1"]["kernel"], "mlp.fc1.weight"
    old, new, steps = before.state["quantizers"][site], state["quantizers"][site], parameters["sites"][site]
    # The NumPy oracle of what Free and the units document.
    scale = np.asarray(old.scale) * np.exp(np.asarray(steps.scale))
    zero_point = np.clip(np.round(old.zero_point + 7 * steps.zero_point), 0, 7)
    np.testing.assert_allclose(new.scale, scale, rtol=1e-6)
    np.testing.assert_array_equal(new.zero_point, zero_point)
    np.testing.assert_array_equal(state["weights"]["mlp"]["fc1"]["kernel"], kernel)
    assert np.std(7 * np.asarray(steps.zero_point)) == pytest.approx(0.3, rel=0.1)  # in codes, 256 draws
    assert np.std(2 * np.asarray(steps.rounding)) == pytest.approx(0.3, rel=0.05)  # in steps, 16384 draws
    bias = before.state["weights"]["mlp"]["fc1"]["bias"]
    change = np.asarray(state["weights"]["mlp"]["fc1"]["bias"]) - np.asarray(bias)
    assert np.std(change) == pytest.approx(0.3, rel=0.1)  # absolute, 256 draws
    codes = np.clip(np.round(np.asarray(kernel) / scale + zero_point + 2 * np.asarray(steps.rounding)), 0, 7)
    assert np.mean(new.codes(kernel) != codes) < 1e-3  # a rounding tie or so
    assert np.mean(new.codes(kernel) != old.codes(kernel)) > 0.1


def test_kernels_whose_quantizer_learns_no_rounding_move_by_steps_of_their_channels(golden: Path) -> None:
    base, site = base_of(golden, "omse"), "blocks.0.mlp.fc1.weight"
    grid = base.quantizers[site]
    assert isinstance(grid, Uniform)
    inputs = base.model.layer("blocks.0.mlp.fc1")["kernel"].shape[0]
    ones = jnp.ones_like(grid.scale)
    dual = DualUniform(
        grid.scale, grid.zero_point, 2 * ones, grid.zero_point, jnp.arange(inputs) < 3, grid.low, grid.high
    )
    model = replace(base, quantizers={**base.quantizers, site: dual})
    _, bind, before, parameters = make_learnable(model, "blocks.0", CONFIG)
    assert before.candidate["mlp.fc1.weight"].rounding is None
    (key,) = parameters["kernels"]
    np.testing.assert_array_equal(before.units["kernels"][key], grid.scale)
    parameters["kernels"][key] = parameters["kernels"][key] + 1.0
    moved = bind_learned(bind, before, parameters)["weights"]["mlp"]["fc1"]["kernel"]
    np.testing.assert_array_equal(moved, before.state["weights"]["mlp"]["fc1"]["kernel"] + 1.0)


@pytest.mark.slow
def test_parameters_of_zero_change_no_bit(golden: Path) -> None:
    for name in BASES:
        base = base_of(golden, name)
        for stage in base.model.architecture.stage_names:
            _, bind, learnable, parameters = make_learnable(base, stage, CONFIG)
            same = jax.jit(bind_learned, static_argnums=0)(bind, learnable, parameters)
            jax.tree.map(np.testing.assert_array_equal, same, learnable.state)


@pytest.mark.slow
def test_gradients_pass_integer_layer_norm_and_integer_softmax(golden: Path) -> None:
    base = base_of(golden, "log-int-softmax")
    stage = base.stages()[1]
    x = stage_inputs(base.stages()[:1], images(golden)[:8])[-1]
    function, bind, before, parameters = make_learnable(base, stage.name, CONFIG)
    exact = stage.function(stage.state, x).values
    ours = array_of(function(before.state, x))
    np.testing.assert_allclose(ours, exact, atol=1e-5)  # not one step of the output, 0.02, is off

    def loss_of(parameters: Any) -> jax.Array:
        return jnp.mean(array_of(function(bind_learned(bind, before, parameters), x)) ** 2)

    gradients = jax.jit(jax.grad(loss_of))(parameters)
    for path, gradient in jax.tree_util.tree_leaves_with_path(gradients):
        assert np.isfinite(gradient).all(), path
    # Through the softmax to the query's share of qkv, and through both LayerNorms to their weights.
    assert np.all(np.any(np.asarray(gradients["sites"]["attn.qkv.weight"].rounding)[:, :64] != 0, 0))
    for norm in ("norm1", "norm2"):
        assert np.any(np.asarray(gradients["weights"][f"['{norm}']['weight']"]) != 0)


def test_power_of_two_factors_stay_such(golden: Path) -> None:
    base = base_of(golden, "fq-vit")
    _, bind, before, parameters = make_learnable(base, "blocks.0", CONFIG)
    learned_of = parameters["sites"]["residual1"]
    assert learned_of.names == ("scale",) and learned_of.scale.shape == ()
    state = bind_learned(bind, before, jax.tree.map(lambda a: a + 0.3, parameters))
    scale = np.asarray(state["quantizers"]["residual1"].scale)
    exponents = np.log2(scale / scale.min())
    np.testing.assert_allclose(exponents, np.round(exponents), atol=1e-6)
    assert exponents.max() > 0


def test_a_rate_of_zero_leaves_its_parameters_out_alone(golden: Path) -> None:
    base = base_of(golden, "omse")

    def learned_with(**rates: float) -> tuple[set[str], set[str]]:
        _, _, _, parameters = make_learnable(base, "blocks.0", replace(CONFIG, **rates))  # type: ignore[arg-type]
        assert not parameters["kernels"]
        return {name for free in parameters["sites"].values() for name in free.names}, set(parameters["weights"])

    every, floats = learned_with()
    assert every == {"scale", "bias", "rounding", "zero_point"}
    assert floats == {f"['{norm}']['{name}']" for norm in ("norm1", "norm2") for name in ("weight", "bias")}
    for rate, name in {"scale_rate": "scale", "zero_point_rate": "zero_point", "rounding_rate": "rounding"}.items():
        assert learned_with(**{rate: 0.0}) == (every - {name}, floats), rate
    assert learned_with(weight_rate=0.0) == (every - {"bias"}, set())


def test_the_first_step_is_each_rate_in_its_unit(golden: Path) -> None:
    """Adam's first step is the rate itself, whatever the gradient: of a zero point in codes, of a rounding in steps."""
    base = base_of(golden, "omse")
    config = replace(CONFIG, steps=1000)
    function, bind, learnable, parameters = make_learnable(base, "blocks.0", config)
    x = stage_inputs(base.stages()[:1], images(golden)[:8])[-1]
    target = jnp.zeros(x.shape)
    steps, _ = train_step_program()(
        function, bind, config, learnable, parameters, make_optimizer(config).init(parameters),
        x, x.values, target + 1.0, jnp.ones(()), KEY,
    )  # fmt: skip
    free, norm = steps["sites"]["mlp.fc1.weight"], np.abs(steps["weights"]["['norm2']['bias']"])
    kernel = np.asarray(base.model.layer("blocks.0.mlp.fc1")["kernel"])
    bias = np.abs(free.bias) * 0.1 * np.linalg.norm(kernel, axis=0)
    found = {
        "scale": np.abs(free.scale), "zero_point": 7 * np.abs(free.zero_point), "rounding": 2 * np.abs(free.rounding),
        "bias": bias, "norm": norm,
    }  # fmt: skip
    rates = {"scale": 5e-3, "zero_point": 2e-2, "rounding": 3e-3, "bias": 1e-3, "norm": 1e-3}
    for name, values in found.items():
        assert np.median(values) == pytest.approx(rates[name], rel=1e-2), name  # small gradients feel Adam's epsilon


def test_a_gradient_that_is_no_number_leaves_its_parameter_alone(golden: Path) -> None:
    _, _, _, parameters = make_learnable(base_of(golden, "omse"), "embed", CONFIG)
    optimizer = make_optimizer(CONFIG)
    gradients = jax.tree.map(lambda a: jnp.full_like(a, jnp.nan), parameters)
    updates, state = optimizer.update(gradients, optimizer.init(parameters))
    assert all(np.all(np.asarray(leaf) == 0) for leaf in jax.tree.leaves(updates))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))


@pytest.mark.slow
def test_the_same_key_gives_the_same_bits_and_another_key_others(golden: Path) -> None:
    model, base, config = small_model(golden), base_of(golden, "omse"), replace(CONFIG, steps=3)
    one, same, other = (
        reconstruct(model, base, images(golden)[:32], config, jax.random.key(seed)) for seed in (0, 0, 1)
    )
    for a, b in zip(arrays(one), arrays(same), strict=True):
        np.testing.assert_array_equal(a, b)
    assert any(np.any(a != b) for a, b in zip(arrays(one), arrays(other), strict=True))


@pytest.mark.slow
def test_going_on_after_any_stage_gives_the_same_bits(golden: Path) -> None:
    model, base, config = small_model(golden), base_of(golden, "omse"), replace(CONFIG, steps=3)
    kept: list[QuantizedModel] = []
    seen: list[tuple[int, int]] = []
    whole = reconstruct(
        model, base, images(golden)[:32], config, KEY,
        lambda done, total: seen.append((done, total)), lambda index, so_far, before, after: kept.append(so_far),
    )  # fmt: skip
    assert seen == [(i, 15) for i in range(1, 16)]
    for done, so_far in enumerate(kept[:-1], 1):
        again = reconstruct(model, so_far, images(golden)[:32], config, KEY, start=done)
        for a, b in zip(arrays(again), arrays(whole), strict=True):
            np.testing.assert_array_equal(a, b)


_TWO_DEVICES = """
import sys
from pathlib import Path
import jax, numpy as np
from test_blocks import CONFIG, KEY, arrays, base_of, images, reconstruct, replace, small_model
assert jax.device_count() == 2
folder, kept, better = Path(sys.argv[1]), [], []
model, base, config = small_model(folder), base_of(folder, "omse"), replace(CONFIG, steps=3)
def on_stage(index, so_far, before, after):
    kept.append(so_far)
    better.append(after < before)
whole = reconstruct(model, base, images(folder)[:33], config, KEY, on_stage=on_stage)
assert any(better), better
again = reconstruct(model, kept[1], images(folder)[:33], config, KEY, start=2)
for a, b in zip(arrays(again), arrays(whole), strict=True):
    np.testing.assert_array_equal(a, b)
placed = [x for x in jax.tree.leaves([whole.model.weights, dict(whole.quantizers)]) if isinstance(x, jax.Array)]
assert all(len(x.devices()) == 1 for x in placed)
"""


@pytest.mark.slow
def test_two_devices_learn_together_and_go_on_with_the_same_bits(golden: Path) -> None:
    """With a last chunk of one image, which they cannot divide; the result is on no mesh."""
    environment = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.pathsep.join(map(str, (Path(__file__).parent, *Path(__file__).parents[1:3]))),
    }
    command = [sys.executable, "-c", _TWO_DEVICES, str(golden)]
    child = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert child.returncode == 0, child.stderr[-2000:]


@pytest.mark.slow
def test_constant_images_give_a_finite_model_that_is_no_worse(golden: Path) -> None:
    constant = np.zeros((16, 32, 32, 3), np.float32)
    for name, config in (("omse", replace(CONFIG, steps=3)), ("fq-vit", CONFIG)):
        errors: list[tuple[float, float]] = []
        model = reconstruct(
            small_model(golden), base_of(golden, name), constant, config, KEY,
            on_stage=lambda index, model, before, after: errors.append((before, after)),  # noqa: B023
        )  # fmt: skip
        assert all(np.isfinite(leaf).all() for leaf in arrays(model))
        assert all(np.isfinite(after) and after <= before for before, after in errors)


def test_easy_images_come_first_and_all_of_them_in_the_second_half() -> None:
    easiest_first = np.random.default_rng(0).permutation(40)
    config = ReconstructionConfig(steps=20, batch=4, easy_first=0.3)
    steps = list(_draw_batches(easiest_first, config, KEY))
    rank = np.argsort(easiest_first)  # place of every image in the order
    for step, rows in enumerate(steps[:10]):
        assert len(set(rows)) == 4 and rank[rows].max() < round((0.3 + 0.07 * step) * 40)  # 0.7 in ten steps
    assert rank[np.concatenate(steps[10:])].max() > 35
    few = list(_draw_batches(easiest_first[:3], config, KEY))
    assert all(sorted(rows) == sorted(easiest_first[:3]) for rows in few)


def test_a_mixed_input_holds_elements_of_both_in_the_unit_of_its_steps() -> None:
    x = Tensor(jnp.full((4, 500), 2.0), jnp.float32(0.5))
    other = jnp.full((4, 500), 7.0)
    half = np.asarray(mix_inputs(x, other, 0.5, KEY).steps)
    assert set(np.unique(half)) == {2.0, 14.0}
    assert 0.45 < np.mean(half == 14.0) < 0.55  # four deviations
    np.testing.assert_array_equal(mix_inputs(x, other, 1.0, KEY).values, other)


@pytest.mark.slow
def test_importance_is_the_mean_squared_gradient_of_the_loss(golden: Path) -> None:
    model, some = small_model(golden), images(golden)[:8]
    found = output_importance(model, some, 8, KEY)
    assert list(found) == ["blocks.2", "blocks.1", "blocks.0", "embed"]
    stages = model.stages()
    inputs = stage_inputs(stages, Tensor(jnp.asarray(some)))
    labels = jax.random.categorical(jax.random.fold_in(KEY, 0), inputs[-1].logits)

    def loss(values: jax.Array) -> jax.Array:
        x: Any = Tensor(values)
        for stage in stages[2:]:
            x = stage.function(stage.state, x)
        logits = x.logits
        return -jnp.sum(jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], 1))

    squared = np.mean(jax.grad(loss)(inputs[2].values) ** 2, 0)
    # One program or a program a stage: gradients are float32 sums of terms that cancel, so what is small beside the
    # mean of 1 is off by a few of its last places squared (2e-6 measured on jax 0.7.2).
    np.testing.assert_allclose(found["blocks.0"], squared / squared.mean(), rtol=1e-4, atol=1e-5)
    assert found["blocks.2"].shape == (1, 64)  # the class token, which the head reads
