"""The search: passes over the stages, last to first, resumable after every stage."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, PyTree

from cptv_jax.search.evaluator import Evaluator
from cptv_jax.search.state import Progress, Proposal, Scales, SearchState
from cptv_jax.search.strategies import Strategy

FRACTIONS = (0.5, 1.0)  # of a proposal that are tried; the likeliest last, as it then stands in the evaluator


# Of the scales, the pass, a key, the progress of an interrupted proposal (empty at its beginning), and whom to tell of
# progress.
Propose = Callable[[Scales, int, Array, Progress, Callable[[Progress], None]], Proposal]


Opening = Callable[[Scales], Scales]  # steps from the scales of the moment, computed without gradients


class Evolution(NamedTuple):
    """What came of a strategy at one stage.

    accepted: (round, loss) for each round that improved on all before it. sigma: see SearchState.
    """

    candidate: PyTree
    loss: float
    accepted: list[tuple[int, float]]
    sigma: float | None


def evolve_stage(
    evaluator: Evaluator,
    index: int,
    strategy: Strategy,
    loss: float,
    key: Array,
    on_round: Callable[[int, float], None] = lambda evaluated, best: None,
) -> Evolution:
    """Runs a strategy at one stage.

    on_round(candidates evaluated, best loss) is called after every round.
    """
    candidate = evaluator.stages[index].candidate
    state = strategy.init(candidate, loss)
    best, accepted = loss, []
    for round_index in range(strategy.rounds):
        population = strategy.ask(state, jax.random.fold_in(key, round_index))
        losses = evaluator.losses(index, population)
        state = strategy.tell(state, population, losses)
        candidate, value = strategy.best(state)
        if value < best:
            best = value
            accepted.append((round_index, best))
        on_round(len(losses), best)
    return Evolution(candidate, best, accepted, getattr(state, "sigma", None))


def _placed(evaluator: Evaluator, order: Sequence[int], scales: Scales) -> None:
    for index in order:
        evaluator.accept(index, scales[evaluator.stages[index].name])


def consider(evaluator: Evaluator, order: Sequence[int], state: SearchState, proposal: Proposal) -> SearchState:
    """The state after a proposal for all stages: it, or a fraction of it, is taken if it lowers the loss.

    order: indices of the searched stages.
    """
    assert state.loss is not None
    direction = proposal.steps
    moves = {evaluator.stages[index].name: evaluator.stages[index].move for index in order}
    best, taken, scales = state.loss, 0.0, state.scales
    for fraction in FRACTIONS:
        steps = {name: jax.tree.map(lambda step, f=fraction: f * step, direction[name]) for name in moves}
        trial = {name: move(state.scales[name], steps[name]) for name, move in moves.items()}
        _placed(evaluator, order, trial)
        loss = evaluator.loss_of(order[0], trial[evaluator.stages[order[0]].name])
        if loss < best:
            best, taken, scales = loss, fraction, trial
    if taken != FRACTIONS[-1]:  # what stands in the evaluator
        _placed(evaluator, order, scales)
    # Evolution takes random parts of the direction back; of one that was not taken, these parts are then tried.
    length = taken or -FRACTIONS[0]
    record = {"event": "proposal", "pass": state.pass_index + 1, "fraction": taken, "loss": best}
    records = [record | {"batch_losses": list(proposal.losses)}] if proposal.losses else [record]
    if taken:
        records.append({"event": "accepted", "pass": state.pass_index + 1, "stage": "all", "round": 0, "loss": best})
    return replace(
        state,
        scales=scales,
        proposed=True,
        progress={},
        direction={name: jax.tree.map(lambda step: length * step, steps) for name, steps in direction.items()},
        loss=best,
        evaluations=state.evaluations + len(FRACTIONS),
        log=(*state.log, *records),
    )


def run_search(
    evaluator: Evaluator,
    strategy_of: Callable[[str, PyTree, float | None], Strategy],
    passes: int,
    key: Array,
    state: SearchState,
    held_out_loss: Callable[[Sequence[Any]], float] | None = None,
    on_round: Callable[[str, int, float], None] = lambda stage, evaluated, best: None,
    on_stage: Callable[[SearchState], None] = lambda state: None,
    propose: Propose | None = None,
    openings: Sequence[Opening] = (),
    patience: int | None = None,
    idle_stages: int | None = None,
) -> SearchState:
    """Continues a search from `state` to its end (CPT-V, section 3.3: blocks from last to first, `passes` times).

    strategy_of: the strategy for a stage, by its name, the direction of the pass's proposal there (None without) and
    the sigma that the stage before ended with.
    key: of the whole search; each pass, stage and round folds in its index, so that a resumed search draws what an
    uninterrupted one would.
    held_out_loss: loss of a list of stages on images that the search does not see; it picks the best among the start
    and the passes. Without it the last pass is the best.
    on_stage: called with the state after every stage, for saving; the scales in it may be saved as float32.
    propose: gives steps for all stages at the start of a pass, which the true loss then judges. openings: give steps
    from the scales of the moment, which are tried one after the other before the first, if they move anything.
    patience: end after so many passes in a row that did not lower the held-out loss. idle_stages: end a pass after so
    many stages in a row that did not lower the loss.
    """
    order = [i for i, stage in reversed(list(enumerate(evaluator.stages))) if stage.searchable]
    _placed(evaluator, order, state.scales)
    if state.loss is None:
        start = evaluator.stages[order[0]].candidate
        held_out = held_out_loss(evaluator.stages) if held_out_loss else None
        loss = evaluator.loss_of(order[0], start)
        record = {"event": "start", "loss": loss, "held_out": held_out}
        state = replace(state, loss=loss, best_held_out=held_out, evaluations=1, log=(*state.log, record))
        on_stage(state)
    while state.pass_index < passes and (patience is None or state.pass_index - state.best_pass < patience):
        pass_key = jax.random.fold_in(key, state.pass_index)
        if propose and not state.proposed:
            for opening in openings[state.opened :]:
                steps = opening(state.scales)
                if any(np.any(step) for step in jax.tree.leaves(steps)):
                    state = replace(consider(evaluator, order, state, Proposal(steps)), proposed=False)
                state = replace(state, opened=state.opened + 1)
                on_stage(state)
            proposal_key = jax.random.fold_in(pass_key, len(evaluator.stages))

            def save(progress: Progress, state: SearchState = state) -> None:
                on_stage(replace(state, proposed=False, progress=progress))

            proposal = propose(state.scales, state.pass_index, proposal_key, state.progress, save)
            state = consider(evaluator, order, state, proposal)
            on_stage(state)
        index = order[state.position]
        name = evaluator.stages[index].name
        stage_key = jax.random.fold_in(pass_key, index)
        evaluated = 0

        def count(candidates: int, best: float, name: str = name) -> None:
            nonlocal evaluated
            evaluated += candidates
            on_round(name, candidates, best)

        assert state.loss is not None
        strategy = strategy_of(name, state.direction.get(name), state.sigma)
        found = evolve_stage(evaluator, index, strategy, state.loss, stage_key, count)
        evaluator.accept(index, found.candidate)
        records = [
            {"event": "accepted", "pass": state.pass_index + 1, "stage": name, "round": round_index + 1, "loss": value}
            for round_index, value in found.accepted
        ]
        state = replace(
            state,
            scales={**state.scales, name: evaluator.stages[index].candidate},
            position=state.position + 1,
            loss=found.loss,
            sigma=found.sigma,
            evaluations=state.evaluations + evaluated,
            log=(*state.log, *records),
        )
        names = [evaluator.stages[i].name for i in order[: state.position]]
        if state.position == len(order) or (idle_stages and _idle(state, names) >= idle_stages):
            state = _finish_pass(state, held_out_loss(evaluator.stages) if held_out_loss else None)
        on_stage(state)
    return state


def _idle(state: SearchState, visited: Sequence[str]) -> int:
    """How many of the stages visited in this pass, the last ones, did not lower the loss."""
    here = (record for record in state.log if record["event"] == "accepted" and record["pass"] == state.pass_index + 1)
    lowered = {record["stage"] for record in here}
    return next((i for i, name in enumerate(reversed(visited)) if name in lowered), len(visited))


def _finish_pass(state: SearchState, held_out: float | None) -> SearchState:
    """Moves on to the next pass and remembers the present scales if they are the best so far."""
    number = state.pass_index + 1
    better = held_out is None or state.best_held_out is None or held_out < state.best_held_out
    record = {"event": "pass", "pass": number, "loss": state.loss, "held_out": held_out}
    record["evaluations"] = state.evaluations
    state = replace(state, pass_index=number, position=0, proposed=False, log=(*state.log, record))
    return replace(state, best_pass=number, best_held_out=held_out, best_scales=state.scales) if better else state
