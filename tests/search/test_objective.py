"""Objectives against float64 NumPy, and the properties that the search relies on."""

import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import log_softmax, logsumexp

from cptv_jax.errors import InputError
from cptv_jax.runtime.stages import Output
from cptv_jax.search import OBJECTIVES, Objective

# Losses are O(1) to O(2 T log batch), from sums of at most a few hundred float32 terms: a few units in the last place.
RELATIVE = 1e-6


def pair(seed: int, batch: int = 50, dim: int = 10, noise: float = 0.5) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    teacher = 3 * rng.normal(size=(batch, dim))
    student = teacher + noise * rng.normal(size=(batch, dim))
    return student.astype(np.float32), teacher.astype(np.float32)


def output(logits: np.ndarray, features: np.ndarray | None = None) -> Output:
    return Output(jnp.asarray(logits if features is None else features), jnp.asarray(logits))


def loss(name: str, student: np.ndarray, teacher: np.ndarray, temperature: float = 3.0) -> float:
    return float(Objective(name, temperature=temperature)(output(student), output(teacher)))


def unit(x: np.ndarray) -> np.ndarray:
    x = np.asarray(x, np.float64)
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


def oracle(name: str, student: np.ndarray, teacher: np.ndarray, temperature: float) -> float:
    """The definitions, image by image, in float64."""
    s, t = np.asarray(student, np.float64), np.asarray(teacher, np.float64)
    values = []
    for i in range(len(s)):
        if name == "infonce":
            similarity = np.array([unit(s[i]) @ unit(other) for other in t]) / temperature
            values.append(2 * temperature * (logsumexp(similarity) - similarity[i]))
        elif name == "mse":
            values.append(np.mean((s[i] - t[i]) ** 2))
        elif name == "kl":
            p, q = log_softmax(t[i] / temperature), log_softmax(s[i] / temperature)
            values.append(np.sum(np.exp(p) * (p - q)))
        elif name == "cosine":
            values.append(1 - unit(s[i]) @ unit(t[i]))
    return float(np.mean(values))


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_values_are_those_of_the_definitions(name: str, temperature: float) -> None:
    for seed, batch, dim in ((0, 50, 10), (1, 7, 33), (2, 1, 5)):
        student, teacher = pair(seed, batch, dim)
        expected = oracle(name, student, teacher, temperature)
        # atol: KL and cosine are differences of numbers near one; 1e-6 is eight units in their last place.
        np.testing.assert_allclose(loss(name, student, teacher, temperature), expected, rtol=RELATIVE, atol=1e-6)


@pytest.mark.parametrize("batch", [32, 100])
@pytest.mark.parametrize("number", range(5))
def test_the_contrastive_loss_is_the_published_one(shared: Path, golden: Path, batch: int, number: int) -> None:
    name = "evolq_losses.npz"
    path = golden / name if (golden / name).exists() else shared / "golden" / name
    if not path.exists():
        pytest.skip(f"no {name}")
    with np.load(path, allow_pickle=False) as file:
        recorded = {key: file[f"B{batch}/pair{number}/{key}"] for key in ("q", "k", "contrastive_T1", "contrastive_T3")}
    for temperature in (1, 3):
        found = loss("infonce", recorded["q"], recorded["k"], float(temperature))
        # 1e-5 is the interchange format's bound; q is the quantized role.
        np.testing.assert_allclose(found, recorded[f"contrastive_T{temperature}"], rtol=1e-5)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_order_of_the_images_does_not_matter(name: str) -> None:
    student, teacher = pair(3)
    order = np.random.default_rng(0).permutation(len(student))
    # atol: cosine is one minus a mean near one, good to a unit or two in the last place of one.
    np.testing.assert_allclose(
        loss(name, student[order], teacher[order]), loss(name, student, teacher), rtol=RELATIVE, atol=3e-7
    )


@pytest.mark.parametrize("name", OBJECTIVES)
def test_pairing_an_image_with_another_images_target_is_worse(name: str) -> None:
    student, teacher = pair(4)
    assert loss(name, np.roll(student, 1, 0), teacher) > loss(name, student, teacher)


@pytest.mark.parametrize("name", ["mse", "kl", "cosine"])
def test_equal_outputs_have_no_loss(name: str) -> None:
    teacher = pair(5)[1]
    assert loss(name, teacher, teacher) == pytest.approx(0, abs=3e-7)  # two units in the last place of one


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([2, 5, 20]), st.sampled_from([0.3, 3.0]))
def test_no_student_is_below_the_least_contrastive_loss_and_a_perfect_match_reaches_it(
    seed: int, batch: int, temperature: float
) -> None:
    student, teacher = pair(seed, batch, 24)
    # The least value: similarity 1 with the own target, -1 with all others.
    least = 2 * temperature * np.log1p((batch - 1) * np.exp(-2 / temperature))
    assert loss("infonce", student, teacher, temperature) >= least * (1 - RELATIVE)
    opposed = np.concatenate([teacher[:1], -teacher[:1]])  # two images can reach it
    least = 2 * temperature * np.log1p(np.exp(-2 / temperature))
    # abs: the loss is a difference of numbers up to 1 / temperature, times 2 * temperature.
    assert loss("infonce", 3 * opposed, opposed, temperature) == pytest.approx(least, rel=1e-6, abs=1e-6)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.floats(0.05, 20))
def test_only_directions_count_in_the_contrastive_loss(seed: int, factor: float) -> None:
    student, teacher = pair(seed, 12, 6)
    scaled = (student * np.float32(factor)).astype(np.float32)
    assert loss("infonce", scaled, teacher) == pytest.approx(loss("infonce", student, teacher), rel=RELATIVE)


def test_the_own_pair_is_what_lowers_the_contrastive_loss() -> None:
    """Moving the student towards its own target lowers the loss; the gradient agrees in direction for every image."""
    student, teacher = pair(6, noise=3.0)
    values = [loss("infonce", student + a * (teacher - student), teacher) for a in np.linspace(0, 1, 6)]
    assert values == sorted(values, reverse=True) and values[0] - values[-1] > 0.1


def test_divergence_is_zero_only_for_equal_distributions() -> None:
    student, teacher = pair(7)
    shifted = teacher + np.float32(2)  # the same softmax
    # Shifting by 2 rounds each logit to 2^-21 or so; KL is quadratic in that.
    assert abs(loss("kl", shifted, teacher)) < 1e-6
    assert loss("kl", student, teacher) > 1e-3
    assert loss("kl", student, teacher) != pytest.approx(loss("kl", teacher, student), rel=1e-3)  # not symmetric


def test_temperature_acts_where_it_should() -> None:
    student, teacher = pair(8)
    by_temperature = {name: [loss(name, student, teacher, t) for t in (1.0, 3.0)] for name in OBJECTIVES}
    for name in ("infonce", "kl"):
        assert by_temperature[name][0] != pytest.approx(by_temperature[name][1], rel=1e-2)
    for name in ("mse", "cosine"):
        assert by_temperature[name][0] == by_temperature[name][1]


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_zero_vector_is_finite(name: str) -> None:
    student, teacher = pair(9)
    student[3] = 0
    teacher[5] = 0
    value = loss(name, student, teacher)
    assert math.isfinite(value)
    np.testing.assert_allclose(value, oracle(name, student, teacher, 3.0), rtol=RELATIVE, atol=1e-6)


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_an_overflown_output_counts_as_infinitely_bad(name: str, bad: float) -> None:
    student, teacher = pair(10)
    student[2, 4] = bad
    compiled = jax.jit(Objective(name))
    assert loss(name, student, teacher) == math.inf
    assert float(compiled(output(student), output(teacher))) == math.inf


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_named_output_is_compared(name: str) -> None:
    (s, t), (fs, ft) = pair(11), pair(12, dim=17)
    student, teacher = output(s, fs), output(t, ft)
    found = {on: float(Objective(name, on, 3.0)(student, teacher)) for on in ("logits", "features")}
    np.testing.assert_allclose(found["logits"], oracle(name, s, t, 3.0), rtol=RELATIVE, atol=1e-6)
    np.testing.assert_allclose(found["features"], oracle(name, fs, ft, 3.0), rtol=RELATIVE, atol=1e-6)


@pytest.mark.parametrize("name", ["kl", "kl+cosine", "infonce+mse+cosine"])
def test_sums_add_the_losses_of_their_terms_and_of_both_outputs(name: str) -> None:
    (s, t), (fs, ft) = pair(13), pair(14, dim=17)
    found = float(Objective(name, "both", 3.0)(output(s, fs), output(t, ft)))
    wanted = sum(oracle(term, *given, 3.0) for term in name.split("+") for given in ((s, t), (fs, ft)))
    np.testing.assert_allclose(found, wanted, rtol=RELATIVE, atol=2e-6)


def test_equal_objectives_are_one_static_argument() -> None:
    assert Objective("kl") == Objective("kl", "logits", None) and hash(Objective("kl")) == hash(Objective("kl"))
    assert Objective("kl") != Objective("kl", temperature=1.0)


def test_the_published_choice_is_the_default() -> None:
    student, teacher = (output(x) for x in pair(15))
    assert float(Objective()(student, teacher)) == float(Objective("infonce", "logits", 3.0)(student, teacher))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "infonse"}, "name is 'infonse'; did you mean 'infonce'?"),
        ({"name": "kl+infonse"}, "name is 'kl+infonse'; did you mean 'infonce'?"),
        ({"name": ""}, "name is ''"),
        ({"name": "hinge"}, "known: cosine, infonce, kl, mse"),
        ({"on": "feature"}, "did you mean 'features'?"),
        ({"temperature": 0.0}, "it must be greater than 0"),
        ({"temperature": -1.0}, "it must be greater than 0"),
        ({"temperature": math.nan}, "it must be a finite number"),
    ],
)
def test_unusable_settings_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as caught:
        Objective(**arguments)
    assert message in str(caught.value)


def test_each_loss_has_its_own_temperature_unless_one_is_given() -> None:
    s, t = (np.random.default_rng(seed).normal(size=(4, 6)).astype(np.float32) for seed in (0, 1))
    student, teacher = output(s), output(t)
    found = float(Objective("infonce+kl")(student, teacher))
    apart = Objective("infonce", temperature=3.0)(student, teacher) + Objective("kl", temperature=1.0)(student, teacher)
    np.testing.assert_allclose(found, float(apart), rtol=1e-6)  # one addition in float32
    assert float(Objective("infonce+kl", temperature=2.0)(student, teacher)) != found
