"""Low-rank compensation: the layer's float term, and the search for its rank."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cptv_jax.interpreters import FakeQuant, StraightThrough, Tensor
from cptv_jax.methods.aiqvit import fit_low_rank
from cptv_jax.quantizers import LowRank, Quantizer, RankSearch, Uniform

RNG = np.random.default_rng(0)
KERNEL = RNG.standard_normal((12, 7)).astype(np.float32)
SCALE = np.ptp(KERNEL, axis=0) / np.float32(7)
BASE = Uniform(jnp.asarray(SCALE), jnp.full(7, 4.0), jnp.float32(0), jnp.float32(7))
X = RNG.standard_normal((5, 12)).astype(np.float32)
INPUT = Uniform(jnp.float32(0.5), jnp.float32(7), jnp.float32(0), jnp.float32(15))


def searched(preference: list[float], penalty: float = 1.0) -> RankSearch:
    term = fit_low_rank(BASE, jnp.asarray(KERNEL), 4)
    ranks = jnp.asarray([1.0, 2.0, 4.0])
    return RankSearch(BASE, term.down, term.up, ranks, jnp.asarray(preference), jnp.float32(penalty))


def weight_of(quantizer: Quantizer) -> np.ndarray:
    return np.asarray(quantizer.values(quantizer.codes(jnp.asarray(KERNEL))), np.float64)


@pytest.mark.parametrize("interpreter", [FakeQuant, StraightThrough])
def test_a_layer_adds_the_term_to_its_quantized_weight(interpreter: type[FakeQuant]) -> None:
    quantizer = fit_low_rank(BASE, jnp.asarray(KERNEL), 3)
    ops = interpreter({"fc.weight": quantizer, "in": INPUT})
    x = ops.tensor("in", Tensor(jnp.asarray(X)))
    found = ops.linear("fc", jnp.asarray(KERNEL), jnp.ones(7), x).values
    term = np.asarray(quantizer.down, np.float64) @ np.asarray(quantizer.up)
    expected = np.asarray(x.values, np.float64) @ (weight_of(quantizer) + term) + 1
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_the_first_term_is_the_best_of_its_rank() -> None:
    error = KERNEL - weight_of(BASE)
    strengths = np.linalg.svd(error, compute_uv=False)
    for rank in (1, 3, 20):
        term = fit_low_rank(BASE, jnp.asarray(KERNEL), rank)
        left = error - np.asarray(term.down, np.float64) @ np.asarray(term.up)
        # Eckart-Young: what remains are the singular values beyond the rank.
        np.testing.assert_allclose(np.sum(left**2), np.sum(strengths[rank:] ** 2), atol=1e-6)


def test_gates_are_the_probabilities_of_larger_ranks() -> None:
    quantizer = searched([0.0, np.log(2.0), np.log(5.0)])  # 1/8, 2/8, 5/8
    np.testing.assert_allclose(quantizer.gates, [1, 7 / 8, 5 / 8, 5 / 8], rtol=1e-6)
    down, up = quantizer.factors
    candidates = [np.asarray(quantizer.down)[:, :r] @ np.asarray(quantizer.up)[:r] for r in (1, 2, 4)]
    mixture = sum(p * term for p, term in zip((1 / 8, 2 / 8, 5 / 8), candidates, strict=True))
    np.testing.assert_allclose(down @ up, mixture, atol=1e-6)
    assert quantizer.price == pytest.approx((1 + 2 * 2 + 5 * 4) / 8 * (12 + 7) / (12 * 7), rel=1e-6)


def test_the_preferred_rank_is_kept_and_the_rest_is_zero() -> None:
    quantizer = searched([0.0, 3.0, 0.0])
    chosen = quantizer.choose()
    assert type(chosen) is LowRank and chosen.rank == 2
    np.testing.assert_array_equal(chosen.down[:, :2], quantizer.factors[0][:, :2])
    assert not np.any(chosen.down[:, 2:]) and not np.any(chosen.up[2:])
    assert searched([0.0, 0.0, 0.0]).choose().rank == 4  # nothing was learned: the largest
    # Zeros on both sides have no gradient, so they stay.
    gradients = jax.grad(lambda q: jnp.sum((X @ q.down @ q.up - 1) ** 2))(chosen)
    assert not np.any(gradients.down[:, 2:]) and not np.any(gradients.up[2:])


def test_a_price_alone_pulls_towards_the_smallest_rank() -> None:
    gradient = jax.grad(lambda p: replace(searched([0.0, 0.0, 0.0]), preference=p).price)(jnp.zeros(3))
    assert gradient[0] < gradient[1] < gradient[2]


def test_scales_are_searched_as_those_of_the_weight() -> None:
    quantizer = fit_low_rank(BASE, jnp.asarray(KERNEL), 2)
    moved = quantizer.with_scale(quantizer.scale * 2)
    assert type(moved) is LowRank
    kernel = jnp.asarray(KERNEL)
    np.testing.assert_array_equal(moved.codes(kernel), BASE.with_scale(BASE.scale * 2).codes(kernel))
    np.testing.assert_array_equal(moved.down, quantizer.down)
