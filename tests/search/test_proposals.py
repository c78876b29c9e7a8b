"""Proposals for all stages at once: taken by the true loss alone, resumable to the bit."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from searches import Subject, assert_same, search, true_held_out

from cptv_jax.runtime.stages import Stage
from cptv_jax.search import Evaluator
from cptv_jax.search.state import Proposal, SearchState
from cptv_jax.storage.run_directory import RunDirectory


def towards(stages: Sequence[Stage], step: float) -> Callable[..., Proposal]:
    """A proposal that moves every parameter by the same step, whatever it is asked, in two halves of work."""
    steps = {s.name: jax.tree.map(lambda leaf: np.full(np.shape(leaf), step, np.float32), s.candidate) for s in stages}

    def propose(scales: Any, number: int, key: Any, progress: Any, on_progress: Callable[[Any], None]) -> Any:
        if not progress:
            on_progress({"done": np.int32(1), "half": np.float32(step / 2)})
        else:
            assert (progress["done"], progress["half"]) == (1, np.float32(step / 2))
        return Proposal(steps, (0.5, 0.25))

    return propose


def finer_and_coarser(toy: Subject) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Proposals that are taken and rejected: the toy's grids are too coarse."""
    return towards(toy.stages, -0.4), towards(toy.stages, 1.5)


def records(state: SearchState, event: str) -> list[dict[str, Any]]:
    return [record for record in state.log if record["event"] == event]


def test_a_proposal_that_lowers_the_loss_is_taken(toy: Subject, make_evaluator: Callable[..., Evaluator]) -> None:
    good, _ = finer_and_coarser(toy)
    evaluator = make_evaluator()
    found = search(evaluator, passes=1, propose=good)
    (proposal,), start = records(found, "proposal"), records(found, "start")[0]
    assert proposal["fraction"] > 0 and proposal["loss"] < start["loss"]
    assert proposal["batch_losses"] == [0.5, 0.25]
    assert records(found, "accepted")[0]["stage"] == "all"
    assert found.direction["merge"]["input"] == pytest.approx(proposal["fraction"] * -0.4)
    for stage in evaluator.stages:
        jax.tree.map(np.testing.assert_array_equal, stage.candidate, found.scales[stage.name])


def test_a_proposal_that_raises_the_loss_changes_nothing(
    toy: Subject, make_evaluator: Callable[..., Evaluator]
) -> None:
    _, bad = finer_and_coarser(toy)
    found, plain = search(make_evaluator(), propose=bad), search(make_evaluator())
    assert [record["fraction"] for record in records(found, "proposal")] == [0.0, 0.0]
    for name, scales in plain.scales.items():
        jax.tree.map(np.testing.assert_array_equal, found.scales[name], scales)
    assert found.loss == plain.loss and found.evaluations == plain.evaluations + 4
    # Children that take the direction back go to a half of the proposal: from where the search stayed, forwards.
    assert found.direction["merge"]["input"] == pytest.approx(-0.5 * 1.5)


def test_openings_are_tried_once_before_the_first_proposal(
    toy: Subject, make_evaluator: Callable[..., Evaluator]
) -> None:
    good, bad = finer_and_coarser(toy)
    seen: list[Any] = []

    def propose(scales: Any, *rest: Any) -> Any:
        seen.append(scales)
        return bad(scales, *rest)

    opening = good(None, 0, None, {}, lambda progress: None).steps
    nothing = jax.tree.map(np.zeros_like, opening)
    found = search(make_evaluator(), propose=propose, openings=[lambda scales: nothing, lambda scales: opening])
    assert [record["fraction"] > 0 for record in records(found, "proposal")] == [True, False, False]
    alone = search(make_evaluator(), passes=1, propose=good)
    # What the first proposal starts from is what the opening led to.
    first = records(found, "proposal")[0]
    assert {**first, "batch_losses": [0.5, 0.25]} == records(alone, "proposal")[0]
    fraction = first["fraction"]
    for stage in toy.stages:
        steps = jax.tree.map(lambda step: fraction * step, opening[stage.name])
        jax.tree.map(np.testing.assert_array_equal, stage.move(stage.candidate, steps), seen[0][stage.name])


def test_a_search_with_proposals_stopped_anywhere_ends_as_if_it_had_not(
    toy: Subject, make_evaluator: Callable[..., Evaluator], tmp_path: Path
) -> None:
    good, _ = finer_and_coarser(toy)
    held_out, opening = true_held_out(toy), good(None, 0, None, {"done": 1, "half": np.float32(-0.2)}, None).steps
    states: list[SearchState] = []
    options = {"held_out": held_out, "propose": good, "openings": [lambda scales: opening]}
    whole = search(make_evaluator(), on_stage=states.append, **options)
    # The start, the opening, then every pass's half proposal, proposal and stages.
    assert len(states) == 2 + 2 * (2 + 3)
    assert [bool(state.progress) for state in states] == [False, False, *[True, *[False] * 4] * 2]
    assert records(whole, "proposal")[0]["fraction"] > 0  # the opening, without which the rest would end elsewhere
    for number, state in enumerate(states):
        run = RunDirectory(tmp_path / str(number), {"config": {"seed": 0}})
        run.save_state(state)
        saved = run.state()
        assert saved is not None
        assert_same(saved, state)
        assert_same(search(make_evaluator(), state=saved, **options), whole)
