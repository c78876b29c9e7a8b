"""The evaluator: exact whatever is computed together, cached or cut up; one program per entry."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cptv_jax.runtime.forward import _program, forward
from cptv_jax.runtime.stages import Output, Stage
from cptv_jax.search import Evaluator, EvolQ, Generational, Objective
from cptv_jax.search.loop import Search, run_search
from cptv_jax.search.state import initial_state

Subject = Any  # tests/search/conftest.py

ONE_STAGE = 1.0  # bytes: less than any stage's inputs, so the evaluator holds the one that it must


def fingerprint(student: Output, teacher: Output) -> jax.Array:
    """24 bits of a checksum over every bit of the logits and features, as a float32.

    Integer arithmetic: exact in every order of summation, so two outputs have equal fingerprints if and (but for one
    chance in 2^24) only if they are equal bit for bit.
    """

    def checksum(x: jax.Array) -> jax.Array:
        bits = jax.lax.bitcast_convert_type(x, jnp.uint32).ravel()
        weights = (jnp.arange(bits.size, dtype=jnp.uint32) + 1) * jnp.uint32(2654435761)
        mixed = (bits ^ weights) * jnp.uint32(2246822519)
        return jnp.sum((mixed ^ (mixed >> 15)) * (weights | 1))

    both = checksum(student.logits) * jnp.uint32(31) + checksum(student.features)
    return (both >> 8).astype(jnp.float32)


def maximum_error(student: Output, teacher: Output) -> jax.Array:
    """A loss without sums: it depends on neither the order of computation nor the rest of the batch."""
    return jnp.max(jnp.abs(student.logits - teacher.logits))


def population_of(stage: Stage, count: int, seed: int = 0, sigma: float = 0.05) -> Any:
    strategy = Generational(sigma=sigma, children=count)
    return strategy.ask(strategy.init(stage.candidate, 0.0), jax.random.key(seed))[0]


def member(population: Any, index: int) -> Any:
    return jax.tree.map(lambda leaf: leaf[index], population)


def indices(subject: Subject) -> list[int]:
    return [i for i, stage in enumerate(subject.stages) if stage.searchable]


def evaluator(subject: Subject, batch: int, chunk: int, loss: Any = fingerprint, **options: Any) -> Evaluator:
    return Evaluator(subject.stages, subject.batches(batch), subject.teacher(batch), loss, images=chunk, **options)


def full_loss(subject: Subject, stages: Sequence[Stage], batch: int, loss: Any) -> float:
    """The loss without an evaluator: all stages forward for every batch, then its loss."""
    values = [
        np.float64(jax.jit(loss)(forward(stages, images), teacher))
        for images, teacher in zip(subject.batches(batch), subject.teacher(batch), strict=True)
    ]
    return float(np.mean(values))


def replaced(stages: Sequence[Stage], index: int, candidate: Any) -> list[Stage]:
    return [stage.with_candidate(candidate) if i == index else stage for i, stage in enumerate(stages)]


# No hidden coupling


@pytest.mark.parametrize("width", [1, 2, 3])
def test_candidates_of_unlike_stages_do_not_see_one_another(toy: Subject, width: int) -> None:
    """Five candidates: widths 2 and 3 pad."""
    several, single = (evaluator(toy, 12, 6, width=w) for w in (width, 1))
    for index in indices(toy):
        population = population_of(toy.stages[index], 5, index, 0.2)
        values = several.losses(index, population)
        np.testing.assert_array_equal(values, [single.loss_of(index, member(population, i)) for i in range(5)])
        assert values.dtype == np.float64 and len(set(values)) == 5


WEIGHTS = ("attn.qkv.weight", "attn.proj.weight")
ACTIVATIONS = ("attn.qkv", "attn.scores", "attn.softmax", "residual1", "norm2", "mlp.gelu")


@pytest.mark.slow
@pytest.mark.parametrize("sites", [WEIGHTS, (*WEIGHTS, *ACTIVATIONS)], ids=["weights", "weights and activations"])
def test_candidates_of_a_vit_do_not_see_one_another(make_vit: Any, sites: tuple[str, ...]) -> None:
    """Outputs equal to the last bit: matmuls are sums of integers, and no other operation mixes candidates."""
    vit = make_vit(sites)
    by_width = {width: evaluator(vit, 25, 25, width=width) for width in (1, 2, 3)}
    for index in indices(vit):
        population = population_of(vit.stages[index], 4, index)
        single = [full_loss(vit, replaced(vit.stages, index, member(population, i)), 25, fingerprint) for i in range(4)]
        assert len(set(single)) == 4
        for width, several in by_width.items():
            np.testing.assert_array_equal(several.losses(index, population), single, f"{width} at once")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["infonce", "mse", "kl", "cosine"])
@pytest.mark.parametrize("width", [2, 3])
def test_objectives_of_a_vit_do_not_depend_on_how_many_candidates_are_computed_at_once(
    vit: Subject, name: str, width: int
) -> None:
    """An objective is sums of floats, which XLA orders by shape; so each candidate's is computed alone."""
    index = 3
    population = population_of(vit.stages[index], 5)
    values = [evaluator(vit, 25, 25, Objective(name), width=w).losses(index, population) for w in (1, width)]
    np.testing.assert_array_equal(values[1], values[0])


def test_padding_takes_no_place_in_the_losses(toy: Subject) -> None:
    loss = Objective("mse")
    whole = evaluator(toy, 12, 6, loss, width=4)
    population = population_of(toy.stages[1], 6, sigma=0.3)
    values = whole.losses(1, population)
    assert values.shape == (6,)
    for i in range(6):
        expected = full_loss(toy, replaced(toy.stages, 1, member(population, i)), 12, loss)
        assert values[i] == pytest.approx(expected, rel=1e-6)  # float sums, in another order


# The prefix cache


@pytest.mark.parametrize("cache_bytes", [float("inf"), ONE_STAGE])
def test_the_cache_gives_what_the_full_forward_gives(toy: Subject, cache_bytes: float) -> None:
    cached = evaluator(toy, 12, 6, width=1, cache_bytes=cache_bytes)
    for index in (2, 1, 0, 2):
        candidate = member(population_of(toy.stages[index], 1, index, 0.2), 0)
        expected = full_loss(toy, replaced(toy.stages, index, candidate), 12, fingerprint)
        assert cached.loss_of(index, candidate) == expected


@pytest.mark.slow
def test_the_cache_of_a_vit_gives_what_the_full_forward_gives_however_small(vit: Subject) -> None:
    token_bytes = 50 * 17 * 64  # uint8 codes
    made: dict[float, int] = {}
    for cache_bytes in (float("inf"), 2.5 * token_bytes, ONE_STAGE):
        refreshes: list[int] = []
        cached = evaluator(
            vit, 25, 25, width=2, cache_bytes=cache_bytes, on_refresh=lambda d, t, r=refreshes: r.append(d)
        )
        for index in (3, 2, 1):
            population = population_of(vit.stages[index], 2, index)
            expected = [
                full_loss(vit, replaced(vit.stages, index, member(population, i)), 25, fingerprint) for i in range(2)
            ]
            np.testing.assert_array_equal(cached.losses(index, population), expected)
        made[cache_bytes] = len(refreshes)
    # Two batches each time: made once where all fits; two of three stages, then the third; one at a time.
    assert list(made.values()) == [2, 4, 6]


@pytest.mark.parametrize("cache_bytes", [float("inf"), ONE_STAGE])
@pytest.mark.parametrize("accepted", [0, 1, 2])
def test_an_accepted_candidate_counts_at_every_stage_at_once(toy: Subject, accepted: int, cache_bytes: float) -> None:
    cached = evaluator(toy, 12, 6, width=1, cache_bytes=cache_bytes)
    for warm in (2, 0, 2):
        cached.loss_of(warm, toy.stages[warm].candidate)
    candidate = member(population_of(toy.stages[accepted], 1, 7, 0.3), 0)
    cached.accept(accepted, candidate)
    stages = replaced(toy.stages, accepted, candidate)
    before = full_loss(toy, toy.stages, 12, fingerprint)
    for index in (2, 0, 1, 2):
        assert cached.loss_of(index, stages[index].candidate) == full_loss(toy, stages, 12, fingerprint) != before
        other = member(population_of(toy.stages[index], 1, 8, 0.3), 0)
        expected = full_loss(toy, replaced(stages, index, other), 12, fingerprint)
        assert cached.loss_of(index, other) == expected
    assert jax.tree.all(jax.tree.map(lambda a, b: bool(jnp.all(a == b)), cached.stages[accepted].candidate, candidate))


def test_accepting_leaves_the_given_stages_alone(toy: Subject) -> None:
    before = jax.tree.map(np.array, toy.stages[1].state)
    cached = evaluator(toy, 12, 6)
    cached.accept(1, member(population_of(toy.stages[1], 1), 0))
    jax.tree.map(np.testing.assert_array_equal, toy.stages[1].state, before)


# Chunks and batches


@pytest.mark.slow
@pytest.mark.parametrize("chunk", [5, 10, 25])
def test_the_outputs_of_a_vit_do_not_depend_on_how_many_images_are_computed_at_once(vit: Subject, chunk: int) -> None:
    index = 2
    population = population_of(vit.stages[index], 2)
    whole, cut = (evaluator(vit, 50, size, width=2).losses(index, population) for size in (50, chunk))
    np.testing.assert_array_equal(cut, whole)


@pytest.mark.parametrize("chunk", [2, 3, 4, 6])
def test_losses_do_not_depend_on_how_many_images_are_computed_at_once(toy: Subject, chunk: int) -> None:
    for index in indices(toy):
        population = population_of(toy.stages[index], 3, sigma=0.2)
        whole, cut = (evaluator(toy, 12, c, Objective(), width=2).losses(index, population) for c in (12, chunk))
        np.testing.assert_allclose(cut, whole, rtol=1e-6)  # the toy's matmuls are of floats


def test_the_loss_is_the_mean_over_whole_batches(toy: Subject) -> None:
    """infoNCE over batches of 12 has 11 negatives; over 24, or over chunks, it has another value."""
    loss = Objective()
    values = {}
    for batch in (24, 12, 6):
        values[batch] = evaluator(toy, batch, 6, loss).loss_of(2, toy.stages[2].candidate)
        assert values[batch] == pytest.approx(full_loss(toy, toy.stages, batch, loss), rel=1e-6)
    assert values[24] > 1.1 * values[12] > 1.1**2 * values[6]


def test_an_overflown_candidate_is_infinitely_bad_and_spoils_no_other(toy: Subject) -> None:
    population = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf * jnp.nan, leaf]), toy.stages[2].candidate)
    values = evaluator(toy, 12, 6, Objective("mse"), width=3).losses(2, population)
    assert values[1] == np.inf and values[0] == values[2] < np.inf


def test_float64_candidates_are_rounded_to_float32(toy: Subject) -> None:
    exact = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64)[None] * (1 + 1e-12), toy.stages[1].candidate)
    values = evaluator(toy, 12, 6).losses(1, exact)
    assert values[0] == evaluator(toy, 12, 6).loss_of(1, toy.stages[1].candidate)


@pytest.mark.parametrize("batches", [0, 1])
def test_teacher_and_batches_must_match(toy: Subject, batches: int) -> None:
    with pytest.raises(ValueError, match="expected as many"):
        Evaluator(toy.stages, toy.batches(12)[:batches], toy.teacher(12)[: 2 * batches], fingerprint)


# Compilation


@pytest.fixture
def nothing_compiled() -> None:
    """Wrappers that jax.jit makes of one function share a cache, so evaluators count one another's programs."""
    jax.clear_caches()


@pytest.mark.slow
@pytest.mark.usefixtures("nothing_compiled")
def test_a_whole_search_compiles_each_entry_once(vit: Subject) -> None:
    """Three blocks, several passes, both strategies: one program for a generation of any block but the last.

    The last block, of which the head reads one token, is another function and has its own.
    """
    once = {"generation": 2, "losses": 1}  # generation: of the blocks, and of the last one
    cached = evaluator(vit, 25, 25, Objective(), width=2)
    programs = []
    for strategy in (EvolQ(rounds=2), Generational(children=3, rounds=2)):
        for passes in (1, 2):
            run_search(cached, Search(replace(strategy, passes=passes), jax.random.key(0)), initial_state(cached))
            assert cached.compile_counts() == once
            programs.append(_program()._cache_size())
    assert programs == [programs[0]] * 4  # a later pass refreshes its cache with the programs that are there


@pytest.mark.usefixtures("nothing_compiled")
def test_unlike_stages_have_a_program_each(toy: Subject) -> None:
    cached = evaluator(toy, 12, 6, Objective(), width=2)
    for passes in (1, 2):
        strategy = Generational(children=3, passes=passes)
        run_search(cached, Search(strategy, jax.random.key(0)), initial_state(cached))
        assert cached.compile_counts() == {"generation": 3, "losses": 1}
