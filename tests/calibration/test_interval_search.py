"""The interval search of one layer against NumPy, and what dropping candidates early may not change."""

from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
import pytest
from numpy.typing import ArrayLike

from cptv_jax.calibration.interval_search import LayerSearch, LossOptions, Metric, OperandSearch, pick, scale_by_factors
from cptv_jax.calibration.layerwise import Layer, Operation, Samples
from cptv_jax.interpreters.arithmetic import Arithmetic, ArithmeticName
from cptv_jax.quantizers import Uniform, grid
from cptv_jax.runtime.arithmetics import supported_arithmetics

FACTORS = np.linspace(0.2, 1.2, 21).astype(np.float32)
IMAGES, TOKENS, INPUTS, OUTPUTS, HEADS = 6, 5, 8, 12, 3


def uniform(scale: ArrayLike, bits: int = 4) -> Uniform:
    low, high = grid(bits, signed=True)
    return Uniform(jnp.asarray(scale, jnp.float32), jnp.float32(0), jnp.float32(low), jnp.float32(high))


def quantized(x: np.ndarray, scale: np.ndarray | np.floating, bits: int = 4) -> np.ndarray:
    low, high = grid(bits, signed=True)
    return np.clip(np.round(x / scale), low, high) * scale


def linear_search(
    metric: Metric,
    weight_scale: ArrayLike,
    seed: int = 0,
    chunks: int = 3,
    gradient: float = 1.0,
    options: LossOptions | None = None,
) -> LayerSearch:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(IMAGES, TOKENS, INPUTS)).astype(np.float32)
    kernel = (rng.normal(size=(INPUTS, OUTPUTS)) * rng.uniform(0.1, 3, OUTPUTS)).astype(np.float32)
    bias = rng.normal(size=OUTPUTS).astype(np.float32)
    output = x @ kernel + bias
    slope = (rng.normal(size=output.shape) * gradient).astype(np.float32)
    samples = [
        Samples((jnp.asarray(a),), jnp.asarray(b), jnp.asarray(c) if metric == "hessian" else None)
        for a, b, c in zip(*(np.split(array, chunks) for array in (x, output, slope)), strict=True)
    ]
    operation = Operation((jnp.asarray(kernel), jnp.asarray(bias)), jnp.float32(1))
    layer = Layer("layer", ("x", "layer.weight"), operation, samples)
    sides = (uniform(0.4), uniform(weight_scale))
    first, second = (OperandSearch(q, scale_by_factors(q, FACTORS), 16) for q in sides)
    return LayerSearch(layer, (first, second), options or LossOptions(metric))


def matmul_search(options: LossOptions) -> LayerSearch:
    rng = np.random.default_rng(1)
    a = rng.normal(size=(IMAGES, HEADS, TOKENS, INPUTS)).astype(np.float32)
    b = rng.normal(size=(IMAGES, HEADS, INPUTS, TOKENS)).astype(np.float32)
    output = np.float32(0.5) * (a @ b)
    slope = rng.normal(size=output.shape).astype(np.float32)
    samples = [
        Samples((jnp.asarray(x), jnp.asarray(y)), jnp.asarray(o), jnp.asarray(g))
        for x, y, o, g in zip(*(np.split(array, 2) for array in (a, b, output, slope)), strict=True)
    ]
    layer = Layer("scores", ("a", "b"), Operation(None, jnp.float32(0.5)), samples)
    q = uniform(np.asarray([0.3, 0.4, 0.5]).reshape(HEADS, 1, 1))
    operand = OperandSearch(q, scale_by_factors(q, FACTORS), 16)
    return LayerSearch(layer, (operand, operand), options)


def arrays(search: LayerSearch) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray | None]:
    samples, weight = search.layer.samples, search.layer.operation.weight
    assert weight is not None
    x, y = (np.concatenate(parts) for parts in ([s.operands[0] for s in samples], [s.output for s in samples]))
    g = None if samples[0].gradient is None else np.concatenate([np.asarray(s.gradient) for s in samples])
    return x, np.asarray(weight[0]), np.asarray(weight[1]), y, g


@pytest.mark.parametrize("metric", ["l2", "hessian"])
def test_losses_of_weights_in_parts_are_mean_squared_errors_of_their_outputs(metric: Metric) -> None:
    scale = np.asarray([0.2, 0.5, 0.8], np.float32)
    search = linear_search(metric, scale)
    x, kernel, bias, y, g = arrays(search)
    found = search.losses(1, [None, None])
    assert found.shape == (len(FACTORS), 3)
    expected = []
    for factor in FACTORS:
        w = quantized(kernel, np.repeat(scale * factor, OUTPUTS // 3))
        error = (quantized(x, np.float32(0.4)) @ w + bias - y) * (1 if g is None else g)
        expected.append((error**2).reshape(IMAGES, TOKENS, 3, -1).mean((1, 3)).sum(0))
    np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_losses_of_activations_with_a_chosen_weight(metric: Metric = "l2") -> None:
    search = linear_search(metric, np.float32(0.5))
    x, kernel, bias, y, _ = arrays(search)
    found = search.losses(0, [None, np.asarray(3)])
    w = quantized(kernel, np.float32(0.5) * FACTORS[3])
    expected = [((quantized(x, np.float32(0.4) * f) @ w + bias - y) ** 2).mean((1, 2)).sum() for f in FACTORS]
    np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_losses_by_channel_are_each_channels_own() -> None:
    scale = np.random.default_rng(3).uniform(0.2, 0.8, OUTPUTS).astype(np.float32)
    search = linear_search("l2", scale)
    x, kernel, bias, y, _ = arrays(search)
    found = search.losses(1, [None, None])
    expected = [
        ((quantized(x, np.float32(0.4)) @ quantized(kernel, scale * f) + bias - y) ** 2).mean(1).sum(0) for f in FACTORS
    ]
    np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_the_cosine_metric_is_one_minus_the_cosine_of_each_token() -> None:
    scale = np.asarray([0.2, 0.5, 0.8], np.float32)
    search = linear_search("cosine", scale)
    x, kernel, bias, y, _ = arrays(search)
    found = search.losses(1, [None, None])
    theirs = y.reshape(IMAGES, TOKENS, 3, -1)
    for factor, losses in zip(FACTORS, found, strict=True):
        w = quantized(kernel, np.repeat(scale * factor, OUTPUTS // 3))
        ours = (quantized(x, np.float32(0.4)) @ w + bias).reshape(theirs.shape)
        norms = np.linalg.norm(ours, axis=-1) * np.linalg.norm(theirs, axis=-1)
        cosine = np.sum(ours * theirs, -1) / norms
        np.testing.assert_allclose(losses, (1 - cosine).mean(1).sum(0), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("side", [0, 1])
def test_losses_by_head(side: Literal[0, 1]) -> None:
    search = matmul_search(LossOptions("hessian"))
    found = search.losses(side, [None, None])
    assert found.shape == (len(FACTORS), HEADS, 1, 1)
    a, b = (np.concatenate([np.asarray(s.operands[i]) for s in search.layer.samples]) for i in (0, 1))
    y, g = (np.concatenate([np.asarray(getattr(s, n)) for s in search.layer.samples]) for n in ("output", "gradient"))
    initial = np.asarray([0.3, 0.4, 0.5], np.float32).reshape(HEADS, 1, 1)
    for factor, losses in zip(FACTORS, found, strict=True):
        scales = [initial, initial]
        scales[side] = initial * factor
        error = (0.5 * quantized(a, scales[0]) @ quantized(b, scales[1]) - y) * g
        np.testing.assert_allclose(losses.ravel(), (error**2).mean((2, 3)).sum(0), rtol=1e-4)


@pytest.mark.parametrize("metric", ["l2", "hessian", "cosine"])
@pytest.mark.parametrize("scale", [np.float32(0.5), np.asarray([0.2, 0.5, 0.8], np.float32)])
def test_dropping_candidates_early_finds_the_first_minimum(metric: Metric, scale: ArrayLike) -> None:
    for seed in range(3):
        search = linear_search(metric, scale, seed)
        for side in (0, 1):
            losses = search.losses(side, [None, None])
            best = search.best(side, [None, None])
            np.testing.assert_array_equal(best, np.argmin(losses, 0))


def test_early_dropping_saves_work(monkeypatch: pytest.MonkeyPatch) -> None:
    from cptv_jax.calibration import interval_search

    monkeypatch.setattr(interval_search, "_BLOCK", 1)
    calls = []
    program = interval_search._program()

    def counted(*arguments: object) -> object:
        calls.append(arguments)
        return program(*arguments)

    monkeypatch.setattr(interval_search, "_program", lambda: counted)
    search = linear_search("l2", np.float32(0.5), chunks=6)
    search.losses(1, [None, None])
    everything = len(calls)
    calls.clear()
    search.best(1, [None, None])
    assert everything == 6 * len(FACTORS)
    assert len(calls) < 0.8 * everything


def test_ties_go_to_the_first_and_no_information_to_the_neutral_candidate() -> None:
    search = linear_search("hessian", np.float32(0.5), gradient=0.0)
    assert search.best(1, [None, None]) == search.operands[1].neutral == 16
    twice = uniform(0.4)
    layer = linear_search("l2", np.float32(0.5)).layer
    doubled = OperandSearch(twice, scale_by_factors(twice, np.asarray([0.1, 1, 1, 0.1], np.float32)))
    assert LayerSearch(layer, (doubled, OperandSearch()), LossOptions("l2")).best(0, [None, None]) == 1


def test_how_many_candidates_are_computed_at_once_does_not_matter() -> None:
    for side in (0, 1):
        one, many = (matmul_search(LossOptions("l2", at_once)).losses(side, [None, None]) for at_once in (1, 8))
        np.testing.assert_allclose(one, many, rtol=1e-5)  # XLA sums in another order


@pytest.mark.parametrize("name", ["bf16-codes", "int8"])
def test_the_arithmetic_does_not_matter(name: ArithmeticName) -> None:
    if name not in supported_arithmetics():
        pytest.skip(f"{name} cannot be computed here")
    for side in (0, 1):
        for make in (matmul_search, lambda options: linear_search("l2", np.float32(0.5), options=options)):
            plain, other = (
                make(LossOptions("l2", arithmetic=Arithmetic(way, 4, 4))).losses(side, [None, None])
                for way in ("float32", name)
            )
            np.testing.assert_allclose(plain, other, rtol=1e-5)


def test_the_search_alternates_and_stops_repeating_itself() -> None:
    search = linear_search("l2", np.float32(0.5))
    steps: list[tuple[int, tuple[int | None, ...]]] = []

    class Noted(LayerSearch):
        def best(self, side, choices):  # type: ignore[no-untyped-def]
            steps.append((side, tuple(None if c is None else int(c) for c in choices)))
            return super().best(side, choices)

    noted = Noted(search.layer, search.operands, search.options)
    found = noted.search(20)
    assert [side for side, _ in steps[:3]] == [1, 0, 1]  # weights first
    assert steps[0][1] == (None, None)
    assert len(steps) == len({(side, choices[1 - side]) for side, choices in steps}) < 40
    # At a fixed point each is the best beside the other.
    choices: list[Any] = []
    for operand, quantizer in zip(search.operands, found, strict=True):
        assert operand.candidates is not None and quantizer is not None
        choices.append(np.argmin(np.abs(np.asarray(operand.candidates.scale) - quantizer.scale)))
    for side in (0, 1):
        assert np.argmin(search.losses(side, choices)) == choices[side]


def test_each_group_gets_its_own_candidate() -> None:
    initial = uniform(np.asarray([1.0, 2.0, 3.0]))
    picked = pick(scale_by_factors(initial, np.asarray([1, 10], np.float32)), np.asarray([0, 1, 0]))
    np.testing.assert_array_equal(picked.scale, [1, 20, 3])
    assert picked.low.shape == () and picked.zero_point.shape == ()  # type: ignore[attr-defined]
