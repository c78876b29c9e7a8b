"""The search over all stages: resumable to the bit, never worse, and judged by held-out images."""

import dataclasses
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

import jax
import numpy as np
import pytest
from searches import LOSS, STRATEGIES, Subject, assert_same, fake_held_out, search, true_held_out

from cptv_jax.runtime.forward import forward
from cptv_jax.runtime.stages import Stage
from cptv_jax.search import Evaluator, Generational, StageContext
from cptv_jax.search.events import Accepted, PassEnd, Start
from cptv_jax.search.loop import Search, evolve_stage, run_search
from cptv_jax.search.state import SearchState, initial_state
from cptv_jax.search.strategies.base import NO_CONTEXT
from cptv_jax.storage.run_directory import RunDirectory


def differ(a: Any, b: Any) -> bool:
    return any(not np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


class Stopped(Exception):
    pass


def stopped_after(saves: int, kept: list[SearchState]) -> Callable[[SearchState], None]:
    """An on_stage that keeps every state and breaks off after some."""

    def on_stage(state: SearchState) -> None:
        kept.append(state)
        if len(kept) == saves:
            raise Stopped

    return on_stage


# Resuming


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_search_stopped_after_any_stage_ends_as_if_it_had_not(
    toy: Subject, make_evaluator: Callable[..., Evaluator], strategy: str
) -> None:
    held_out = true_held_out(toy)
    states: list[SearchState] = []
    whole = search(make_evaluator(), strategy, held_out=held_out, on_stage=states.append)
    assert len(states) == 1 + 2 * 3  # the start, then every stage of every pass
    assert_same(states[-1], whole)
    kept: list[SearchState] = []
    with pytest.raises(Stopped):
        search(make_evaluator(), strategy, held_out=held_out, on_stage=stopped_after(3, kept))
    for state, same in zip(kept, states, strict=False):
        assert_same(state, same)
    for state in states[:-1]:
        # A new evaluator holds the model as it was before the search.
        assert_same(search(make_evaluator(), strategy, state=state, held_out=held_out), whole)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_search_resumed_from_disk_ends_as_if_it_had_not_stopped(
    toy: Subject, make_evaluator: Callable[..., Evaluator], strategy: str, tmp_path: Path
) -> None:
    held_out = true_held_out(toy)
    whole = search(make_evaluator(), strategy, held_out=held_out)
    identity = {"config": {"seed": 0}}
    for saves in (1, 5):
        run = RunDirectory(tmp_path / str(saves), identity)
        assert run.state() is None
        kept: list[SearchState] = []
        stop = stopped_after(saves, kept)

        def save_and_stop(state: SearchState, run: RunDirectory = run, stop: Any = stop) -> None:
            run.save_state(state)
            stop(state)

        with pytest.raises(Stopped):
            search(make_evaluator(), strategy, held_out=held_out, on_stage=save_and_stop)
        saved = RunDirectory(tmp_path / str(saves), identity).state()
        assert saved is not None
        assert_same(saved, kept[-1])
        assert_same(search(make_evaluator(), strategy, state=saved, held_out=held_out), whole)


def test_a_finished_search_is_left_as_it_is(make_evaluator: Callable[..., Evaluator]) -> None:
    whole = search(make_evaluator())
    assert_same(search(make_evaluator(), state=whole), whole)


def test_more_passes_continue_a_finished_search(make_evaluator: Callable[..., Evaluator]) -> None:
    longer = search(make_evaluator(), passes=3)
    assert_same(search(make_evaluator(), passes=3, state=search(make_evaluator(), passes=2)), longer)


# Keys


def test_the_same_seed_finds_the_same_scales_and_another_seed_others(make_evaluator: Callable[..., Evaluator]) -> None:
    one, same, other = (search(make_evaluator(), seed=seed) for seed in (0, 0, 1))
    assert_same(one, same)
    assert differ(one.scales, other.scales)


def test_every_stage_round_and_pass_draws_anew(make_evaluator: Callable[..., Evaluator]) -> None:
    drawn: list[bytes] = []

    class Recording(Generational):
        def ask(self, state: Any, key: jax.Array) -> Any:
            drawn.append(np.asarray(jax.random.key_data(key)).tobytes())
            return super().ask(state, key)

    search(make_evaluator(), Recording(children=3, rounds=2))
    assert len(drawn) == len(set(drawn)) == 2 * 2 * 3


# What is found


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_search_improves_the_objective_and_never_worsens_it(
    toy: Subject, make_evaluator: Callable[..., Evaluator], strategy: str
) -> None:
    states: list[SearchState] = []
    evaluator = make_evaluator()
    final = search(evaluator, strategy, passes=3, on_stage=states.append)
    losses = [state.loss for state in states if state.loss is not None]
    assert len(losses) == len(states) and losses == sorted(losses, reverse=True) and losses[-1] < losses[0]
    # The loss is that of the scales handed back, by a plain forward pass; float sums may be in another order.
    stages = [stage.with_candidate(final.scales[stage.name]) for stage in toy.stages]
    found = float(LOSS(forward(stages, toy.images), toy.teacher(24)[0]))
    assert found == pytest.approx(final.loss, rel=1e-6)
    assert evaluator.loss_of(2, evaluator.stages[2].candidate) == final.loss


@pytest.mark.parametrize(
    ("held_out", "best"),
    [([3.0, 2.0, 1.0], 2), ([3.0, 1.0, 2.0], 1), ([1.0, 2.0, 3.0], 0), ([1.0, 1.0, 1.0], 0), ([2.0, 1.0, 1.0], 1)],
)
def test_the_pass_with_the_least_held_out_loss_is_returned(
    make_evaluator: Callable[..., Evaluator], held_out: list[float], best: int
) -> None:
    """Pass 0 is the start; of equals the elder."""
    evaluator = make_evaluator()
    at_pass = {0: initial_state(evaluator).scales}

    def remember(state: SearchState) -> None:
        if state.position == 0:
            at_pass[state.pass_index] = state.scales

    final = search(evaluator, held_out=fake_held_out(held_out), on_stage=remember)
    assert (final.best_pass, final.best_held_out) == (best, held_out[best])
    assert not differ(final.best_scales, at_pass[best])
    assert all(differ(at_pass[i], at_pass[j]) for i, j in ((0, 1), (1, 2)))
    # The search goes on from the last pass, whichever is the best.
    assert not differ(final.scales, at_pass[2])


def test_without_held_out_images_the_last_pass_is_returned(make_evaluator: Callable[..., Evaluator]) -> None:
    final = search(make_evaluator())
    assert final.best_pass == 2 and final.best_held_out is None
    assert not differ(final.best_scales, final.scales)


def test_the_held_out_loss_is_asked_of_the_present_stages_once_a_pass(
    make_evaluator: Callable[..., Evaluator],
) -> None:
    asked: list[dict[str, Any]] = []

    def held_out(stages: Sequence[Stage]) -> float:
        asked.append({stage.name: stage.candidate for stage in stages})
        return 1.0

    final = search(make_evaluator(), held_out=held_out)
    assert len(asked) == 3
    assert not differ(asked[0], initial_state(make_evaluator()).scales)
    assert not differ(asked[2], final.scales) and differ(asked[0], asked[2])


# Records


def test_the_log_tells_every_improvement_and_every_pass(make_evaluator: Callable[..., Evaluator]) -> None:
    counted: list[tuple[str, int]] = []
    final = search(
        make_evaluator(),
        held_out=fake_held_out([0.5, 0.25, 0.75]),
        on_round=lambda stage, evaluated, best: counted.append((stage, evaluated)),
    )
    first, *rest = final.log
    assert isinstance(first, Start) and first.held_out == 0.5
    accepted = [event for event in rest if isinstance(event, Accepted)]
    losses = [first.loss, *(event.loss for event in accepted)]
    assert len(losses) > 2 and all(a > b for a, b in pairwise(losses))
    passes = [event for event in rest if isinstance(event, PassEnd)]
    assert [(event.number, event.held_out) for event in passes] == [(1, 0.25), (2, 0.75)]
    # 3 stages, 2 rounds of 3 children, and the start.
    assert [event.evaluations for event in passes] == [1 + 18, 1 + 36] and final.evaluations == 37
    assert passes[-1] == rest[-1] and passes[-1].loss == final.loss == losses[-1]
    assert all(event.stage in ("patches", "merge", "head") and event.round in (1, 2) for event in accepted)
    # Last stage first, and pass by pass.
    assert [name for name, _ in counted] == 2 * (["head"] * 2 + ["merge"] * 2 + ["patches"] * 2)
    assert {evaluated for _, evaluated in counted} == {3}
    order = {"head": 0, "merge": 1, "patches": 2}
    places = [(event.number, order[event.stage], event.round) for event in accepted]
    assert places == sorted(places)


def test_a_stage_without_sites_is_skipped(
    make_toy: Callable[..., Subject], make_evaluator: Callable[..., Evaluator]
) -> None:
    some = make_toy(("patches", "head"))
    evaluator = make_evaluator(some.stages)
    visited: list[str] = []
    final = search(evaluator, on_round=lambda stage, evaluated, best: visited.append(stage))
    assert list(dict.fromkeys(visited)) == ["head", "patches"]
    assert sorted(final.scales) == sorted(final.best_scales) == ["head", "patches"]
    jax.tree.map(np.testing.assert_array_equal, evaluator.stages[1].state, some.stages[1].state)
    assert final.loss is not None and final.loss < final.log[0].loss


def test_one_stage_reports_its_improving_rounds(make_evaluator: Callable[..., Evaluator]) -> None:
    evaluator = make_evaluator()
    start = evaluator.loss_of(1, evaluator.stages[1].candidate)
    rounds: list[float] = []
    strategy = Generational(sigma=0.1, children=3, rounds=6)
    candidate, loss, accepted, carried, found = evolve_stage(
        evaluator,
        1,
        strategy,
        start,
        jax.random.key(0),
        on_round=lambda evaluated, best: rounds.append(best),
    )
    assert evaluator.loss_of(1, candidate) == loss == rounds[-1] < start
    improving = [i for i in range(6) if rounds[i] < ([start, *rounds])[i]]
    assert accepted == [(i, rounds[i]) for i in improving]
    assert carried is None
    assert found is not None and found[0] == 6 - accepted[-1][0]  # so many rounds before the end
    # It proposes only: the stage keeps its scales until they are accepted.
    assert evaluator.loss_of(1, evaluator.stages[1].candidate) == start


def test_patience_ends_a_search_that_no_longer_improves(make_evaluator: Callable[..., Evaluator]) -> None:
    losses = [5.0, 4.0, 4.5, 4.6, 3.0]
    patient = search(make_evaluator(), passes=4, held_out=fake_held_out(losses))
    ended = search(make_evaluator(), passes=4, held_out=fake_held_out(losses), patience=2)
    assert (patient.pass_index, patient.best_pass) == (4, 4)
    assert (ended.pass_index, ended.best_pass) == (3, 1)
    assert_same(search(make_evaluator(), passes=4, state=ended, patience=2), ended)


def test_a_stage_is_told_what_the_one_before_carried(make_evaluator: Callable[..., Evaluator]) -> None:
    told: list[float | None] = []

    class Carrying(Generational):
        def init(self, candidate: Any, loss: float, context: StageContext = NO_CONTEXT) -> Any:
            told.append(context.carried)
            return dataclasses.replace(super().init(candidate, loss), sigma=context.carried or 0.1)

        def carried(self, state: Any) -> float:
            return float(state.sigma)

    def run(state: SearchState, passes: int) -> SearchState:
        return search(make_evaluator(), Carrying(children=3, rounds=1), passes, state=state)

    whole = run(initial_state(make_evaluator()), 2)
    assert told[0] is None and len(told) == 6 and None not in told[1:] and len(set(told)) > 2
    expected, told[:] = list(told), []
    assert_same(run(run(initial_state(make_evaluator()), 1), 2), whole)
    assert told == expected


def test_a_stage_is_told_its_widths_and_how_it_moves(toy: Subject, make_evaluator: Callable[..., Evaluator]) -> None:
    told: list[StageContext] = []

    class Asking(Generational):
        def init(self, candidate: Any, loss: float, context: StageContext = NO_CONTEXT) -> Any:
            told.append(context)
            return super().init(candidate, loss)

    evaluator = make_evaluator()
    what = Search(Asking(passes=1, children=2), jax.random.key(0), widths={"head": (3, 4)})
    run_search(evaluator, what, initial_state(evaluator))
    assert [context.widths for context in told] == [(3, 4), (), ()]
    assert all(context.direction is None and context.move is toy.stages[0].move for context in told)


def test_a_pass_ends_after_stages_in_a_row_that_gain_nothing(make_evaluator: Callable[..., Evaluator]) -> None:
    visited: list[str] = []

    class Idle(Generational):
        idle: ClassVar[int | None] = None

        @property
        def patience_of_stages(self) -> int | None:
            return self.idle

    def run(idle_stages: int | None, state: SearchState | None = None, **hooks: Any) -> SearchState:
        visited.clear()
        Idle.idle = idle_stages
        strategy = Idle(sigma=1e-20, children=2, rounds=1)  # children that are their parent
        return search(
            make_evaluator(), strategy, state=state, on_round=lambda stage, *_: visited.append(stage), **hooks
        )

    assert run(None).pass_index == 2
    every = list(visited)
    assert len(every) == 2 * 3
    states: list[SearchState] = []
    whole = run(2, on_stage=states.append)
    assert visited == every[:2] * 2 and whole.pass_index == 2
    for state in states:  # also where it goes on from what was saved
        assert_same(run(2, state), whole)
    # A stage that gains begins the count anew.
    gained = Accepted(1, every[0], 1, 0.0)
    run(2, dataclasses.replace(states[1], log=(*states[1].log, gained)))
    assert visited[:2] == every[1:3]
