"""Proposals for all stages at once: taken by the true loss alone, resumable to the bit."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from searches import Subject, assert_same, search, true_held_out

from cptv_jax.runtime.stages import Stage
from cptv_jax.search import Evaluator
from cptv_jax.search.events import Accepted, Proposed, Start
from cptv_jax.search.proposals.base import Listener, Proposal
from cptv_jax.search.state import SearchState
from cptv_jax.storage.run_directory import RunDirectory

UNHEARD = Listener()


class Towards:
    """Moves every parameter by the same step, whatever it is asked, in two halves of work."""

    steps = 2

    def __init__(
        self, stages: Sequence[Stage], step: float, every_pass: bool = True, losses: Any = (0.5, 0.25)
    ) -> None:
        def full(leaf: Any) -> np.ndarray:
            return np.full(np.shape(leaf), step, np.float32)

        self.proposal = Proposal({s.name: jax.tree.map(full, s.candidate) for s in stages}, losses)
        self.step, self.every_pass = step, every_pass
        self.seen: list[Any] = []
        self.keys: list[bytes] = []

    def propose(
        self, scales: Any, pass_index: int, key: Any, progress: Any = None, listener: Listener = UNHEARD
    ) -> Proposal:
        self.seen.append(scales)
        self.keys.append(np.asarray(jax.random.key_data(key)).tobytes())
        if not progress:
            listener.on_progress({"done": np.int32(1), "half": np.float32(self.step / 2)})
        else:
            assert (progress["done"], progress["half"]) == (1, np.float32(self.step / 2))
        return self.proposal


def finer_and_coarser(toy: Subject) -> tuple[Towards, Towards]:
    """Proposals that are taken and rejected: the toy's grids are too coarse."""
    return Towards(toy.stages, -0.4), Towards(toy.stages, 1.5)


def proposals(state: SearchState) -> list[Proposed]:
    return [event for event in state.log if isinstance(event, Proposed)]


def test_a_proposal_that_lowers_the_loss_is_taken(toy: Subject, make_evaluator: Callable[..., Evaluator]) -> None:
    good, _ = finer_and_coarser(toy)
    evaluator = make_evaluator()
    found = search(evaluator, passes=1, proposers=[good])
    (proposal,), start = proposals(found), found.log[0]
    assert isinstance(start, Start) and proposal.fraction > 0 and proposal.loss < start.loss
    assert proposal.batch_losses == (0.5, 0.25)
    assert next(event for event in found.log if isinstance(event, Accepted)).stage == "all"
    assert found.direction["merge"]["input"] == pytest.approx(proposal.fraction * -0.4)
    for stage in evaluator.stages:
        jax.tree.map(np.testing.assert_array_equal, stage.candidate, found.scales[stage.name])


def test_a_proposal_that_raises_the_loss_changes_nothing(
    toy: Subject, make_evaluator: Callable[..., Evaluator]
) -> None:
    _, bad = finer_and_coarser(toy)
    found, plain = search(make_evaluator(), proposers=[bad]), search(make_evaluator())
    assert [event.fraction for event in proposals(found)] == [0.0, 0.0]
    for name, scales in plain.scales.items():
        jax.tree.map(np.testing.assert_array_equal, found.scales[name], scales)
    assert found.loss == plain.loss and found.evaluations == plain.evaluations + 4
    # Children that take the direction back go to a half of the proposal: from where the search stayed, forwards.
    assert found.direction["merge"]["input"] == pytest.approx(-0.5 * 1.5)


def test_proposers_of_the_first_pass_alone_come_once_and_before_the_others(
    toy: Subject, make_evaluator: Callable[..., Evaluator]
) -> None:
    nothing = Towards(toy.stages, 0.0, every_pass=False)
    opening, bad = Towards(toy.stages, -0.4, every_pass=False, losses=()), Towards(toy.stages, 1.5)
    found = search(make_evaluator(), proposers=[nothing, opening, bad])
    # What moves nothing is not tried.
    assert [event.fraction > 0 for event in proposals(found)] == [True, False, False]
    assert [len(nothing.seen), len(opening.seen), len(bad.seen)] == [1, 1, 2]
    alone = search(make_evaluator(), passes=1, proposers=[Towards(toy.stages, -0.4)])
    # What the next one starts from is what the opening led to.
    first = proposals(found)[0]
    assert dataclasses.replace(first, batch_losses=(0.5, 0.25)) == proposals(alone)[0]
    for stage in toy.stages:
        steps = jax.tree.map(lambda step: first.fraction * step, opening.proposal.steps[stage.name])
        jax.tree.map(np.testing.assert_array_equal, stage.move(stage.candidate, steps), bad.seen[0][stage.name])


def test_proposers_of_one_pass_have_keys_of_their_own(toy: Subject, make_evaluator: Callable[..., Evaluator]) -> None:
    one, other = Towards(toy.stages, 1.5), Towards(toy.stages, 1.5)
    search(make_evaluator(), proposers=[one, other])
    assert len({*one.keys, *other.keys}) == 4


def test_a_search_with_proposals_stopped_anywhere_ends_as_if_it_had_not(
    toy: Subject, make_evaluator: Callable[..., Evaluator], tmp_path: Path
) -> None:
    good, _ = finer_and_coarser(toy)
    opening = Towards(toy.stages, -0.2, every_pass=False, losses=())
    states: list[SearchState] = []
    options: dict[str, Any] = {"held_out": true_held_out(toy), "proposers": [opening, good]}
    whole = search(make_evaluator(), on_stage=states.append, **options)
    # The start, half the opening and all of it, then every pass's half proposal, proposal and stages.
    assert len(states) == 3 + 2 * (2 + 3)
    assert [bool(state.progress) for state in states] == [False, True, False, *[True, *[False] * 4] * 2]
    assert proposals(whole)[0].fraction > 0  # the opening, without which the rest would end elsewhere
    for number, state in enumerate(states):
        run = RunDirectory(tmp_path / str(number), {"config": {"seed": 0}})
        run.save_state(state)
        saved = run.state()
        assert saved is not None
        assert_same(saved, state)
        assert_same(search(make_evaluator(), state=saved, **options), whole)
