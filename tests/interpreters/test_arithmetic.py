"""Three ways to multiply codes give the same numbers, bit for bit, and they are the exact ones."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cptv_jax.errors import InputError
from cptv_jax.interpreters import ARITHMETICS, Arithmetic, ArithmeticName, Tensor, arithmetic
from cptv_jax.methods.registry import METHODS
from cptv_jax.models.architecture import Architecture, sites_of
from cptv_jax.models.preprocessing import Preprocessing
from cptv_jax.models.timm_weights import from_timm
from cptv_jax.models.vit import ViTConfig
from cptv_jax.models.vit_family import VIT
from cptv_jax.quantized.execution import Simulated
from cptv_jax.quantized.model import Model
from cptv_jax.recipe.resolve import RecipeConfig, resolve
from cptv_jax.runtime import arithmetics
from cptv_jax.runtime.arithmetics import fastest_arithmetic, supported_arithmetics
from cptv_jax.runtime.forward import forward


def codes(rng: Any, bits: int, *shape: int, channels: int | None = None) -> tuple[Tensor, np.ndarray]:
    """Random codes with random zero points, and their steps as int64."""
    high = 2**bits
    stored = rng.integers(0, high, shape, np.uint8, endpoint=False) if bits < 8 else rng.integers(0, 256, shape)
    zero = rng.integers(0, high, () if channels is None else (channels,))
    tensor = Tensor(jnp.asarray(stored, jnp.uint8), jnp.float32(1), jnp.asarray(zero, jnp.float32))
    return tensor, np.asarray(stored, np.int64) - zero


def product(name: ArithmeticName, x: Tensor, w: Tensor, bits: int) -> np.ndarray:
    arithmetic = Arithmetic(name, weight_bits=bits, activation_bits=8)
    return np.asarray(jax.jit(arithmetic.matmul_weight)(x, w))


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), bits=st.integers(2, 8), inputs=st.sampled_from([1, 3, 64, 192, 257]))
def test_products_of_codes_are_exact_in_every_arithmetic(seed: int, bits: int, inputs: int) -> None:
    rng = np.random.default_rng(seed)
    x, steps_x = codes(rng, 8, 5, inputs)
    w, steps_w = codes(rng, bits, inputs, 7, channels=7)
    for name in supported_arithmetics():
        np.testing.assert_array_equal(product(name, x, w, bits), steps_x @ steps_w, name)
        sums = Arithmetic(name, weight_bits=bits).row_sums(x)
        np.testing.assert_array_equal(sums, steps_x.sum(-1, keepdims=True), name)


@pytest.mark.parametrize("name", ARITHMETICS)
def test_the_largest_steps_are_exact_up_to_the_bound_and_equal_beyond_it(name: ArithmeticName) -> None:
    """All codes at their extremes: the sum is the bound itself, in the worst case that shapes and bits allow."""
    if name not in supported_arithmetics():
        pytest.skip(f"{name} cannot be computed here")
    arithmetic = Arithmetic(name)
    terms = arithmetic.exact_terms(8)
    assert terms * 255 * 255 < 2**24 <= (terms + 1) * 255 * 255
    for inputs in (terms, 3072):
        x = Tensor(jnp.full((2, inputs), 255, jnp.uint8), jnp.float32(1), jnp.float32(0))
        w = Tensor(jnp.full((inputs, 3), 255, jnp.uint8), jnp.float32(1), jnp.zeros(3))
        found = product(name, x, w, 8)
        if inputs == terms:
            np.testing.assert_array_equal(found, inputs * 255 * 255)
        # Beyond it parts of equal sums are added in order: the same rounding everywhere.
        np.testing.assert_array_equal(found, product("float32", x, w, 8))


def test_attention_s_products_are_exact_with_batch_and_heads_in_front() -> None:
    rng = np.random.default_rng(1)
    query, steps_q = codes(rng, 8, 2, 3, 5, 16)
    key, steps_k = codes(rng, 8, 2, 3, 16, 6)
    for name in supported_arithmetics():
        np.testing.assert_array_equal(Arithmetic(name).matmul(query, key), steps_q @ steps_k, name)


def test_without_a_zero_point_values_are_multiplied_as_float32() -> None:
    rng = np.random.default_rng(2)
    x, w = (Tensor(jnp.asarray(rng.normal(size=shape), jnp.float32)) for shape in ((4, 8), (8, 3)))
    exact = np.asarray(x.stored, np.float64) @ np.asarray(w.stored, np.float64)
    for name in supported_arithmetics():
        # Eight products of order 1 in float32.
        np.testing.assert_allclose(Arithmetic(name).matmul_weight(x, w), exact, rtol=0, atol=2e-6)


@pytest.mark.skipif("bf16-codes" not in supported_arithmetics(), reason="no bfloat16 products here")
def test_approximate_products_are_those_of_values_rounded_to_bfloat16() -> None:
    rng = np.random.default_rng(3)
    x, w = (Tensor(jnp.asarray(rng.normal(size=shape), jnp.float32)) for shape in ((2, 3, 5, 8), (2, 3, 8, 4)))
    rounded = [np.asarray(t.stored).astype(jnp.bfloat16).astype(np.float64) for t in (x, w)]
    # Eight products of order 1, whose sum is float32.
    np.testing.assert_allclose(Arithmetic(approximate=True).matmul(x, w), rounded[0] @ rounded[1], rtol=0, atol=2e-6)


SMALL = Architecture(
    "small", VIT, ViTConfig(image_size=32, patch_size=8, num_classes=10, width=64, depth=3, heads=4),
    Preprocessing(image_size=32),
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("preset", "bits"), [("evol-q", 4), ("evol-q", 8), ("fq-vit", 8)])
def test_a_model_has_the_same_logits_in_every_arithmetic(golden: Path, preset: str, bits: int) -> None:
    with np.load(golden / "model.npz") as file:
        model = Model(SMALL, from_timm(dict(file), SMALL, "model.npz"))
    with np.load(golden / "data.npz") as file:
        images = jnp.asarray(file["calib_images"].transpose(0, 2, 3, 1)[:32])
    recipe = resolve(RecipeConfig(preset=preset, weight_bits=bits), sites_of(SMALL))
    quantized = METHODS["fq-vit"].quantize(model, [images], recipe, jax.random.key(0))
    outputs = {name: forward(quantized.stages(Simulated(name)), images) for name in supported_arithmetics()}
    for name in supported_arithmetics():
        np.testing.assert_array_equal(outputs[name].logits, outputs["float32"].logits, name)
        np.testing.assert_array_equal(outputs[name].features, outputs["float32"].features, name)
    fractional = {
        site: replaced_zero_point(quantizer) if site == "blocks.0.norm1" else quantizer
        for site, quantizer in quantized.quantizers.items()
    }
    stages = type(quantized)(model, recipe, fractional).stages(Simulated(supported_arithmetics()[-1]))
    assert stages[1].function.operations.arithmetic.name == "float32"  # type: ignore[attr-defined]


def replaced_zero_point(quantizer: Any) -> Any:
    return type(quantizer)(quantizer.scale, quantizer.zero_point + 0.25, quantizer.low, quantizer.high)


def test_the_fastest_arithmetic_is_one_that_works_and_stays() -> None:
    assert fastest_arithmetic() in supported_arithmetics() and fastest_arithmetic() == fastest_arithmetic()
    assert "float32" in supported_arithmetics() and set(supported_arithmetics()) <= set(ARITHMETICS)


def test_an_arithmetic_that_the_backend_gets_wrong_is_not_offered(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "int8" in supported_arithmetics()
    monkeypatch.setattr(arithmetic, "_int8", lambda a, b: jnp.matmul(a.steps, b.steps).at[..., 0].add(1))
    jax.clear_caches()  # programs with the right one
    found = arithmetics._measure_supported.__wrapped__()
    assert "int8" not in found and "float32" in found
    jax.clear_caches()


def test_an_arithmetic_that_the_backend_lacks_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arithmetics, "supported_arithmetics", lambda: ("float32",))
    with pytest.raises(InputError, match=r"arithmetic int8 cannot be computed on this cpu .* to float32, or leave"):
        arithmetics.check_arithmetic("int8")
    arithmetics.check_arithmetic("float32")
