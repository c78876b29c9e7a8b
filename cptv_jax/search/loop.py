"""The search: passes over the stages, last to first, resumable after every stage."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Array, PyTree

from cptv_jax.runtime.stages import Stage
from cptv_jax.search.evaluator import Evaluator
from cptv_jax.search.events import EVERY_STAGE, Accepted, PassEnd, Proposed, Start
from cptv_jax.search.proposals.base import Listener, Progress, Proposal, Proposer, Scales
from cptv_jax.search.state import SearchState
from cptv_jax.search.strategies import StageContext, Strategy

FRACTIONS = (0.5, 1.0)  # of a proposal that are tried; the likeliest last, as it then stands in the evaluator


@dataclass(frozen=True)
class Search:
    """The settings of a search.

    Attributes:
        strategy: The strategy that evolves each stage.
        key: Key of the whole search; each pass, stage and round folds in its index, so that a resumed search draws the
            same numbers as an uninterrupted one.
        proposers: Propose steps for all stages at the start of a pass, which the true loss then judges.
        held_out_loss: Loss of a list of stages on images that the search does not see; it picks the best among the
            start and the passes. Without it the last pass is the best.
        patience: End after this many passes in a row that did not lower the held-out loss; None runs all passes.
        widths: Bits of the searched weights, by stage.
    """

    strategy: Strategy
    key: Array
    proposers: Sequence[Proposer] = ()
    held_out_loss: Callable[[Sequence[Stage]], float] | None = None
    patience: int | None = None
    widths: Mapping[str, tuple[int, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class Hooks:
    """Callbacks that follow the progress of a search.

    Attributes:
        on_round: on_round(stage, candidates evaluated, best loss), after every round.
        on_step: on_step(what a proposer does, in words; the number of its steps that this took).
        on_stage: on_stage(state), after every stage and whenever a proposer can be interrupted; for saving. The scales
            in the state may be saved as float32.
    """

    on_round: Callable[[str, int, float], None] = lambda stage, evaluated, best: None
    on_step: Callable[[str, int], None] = lambda text, steps: None
    on_stage: Callable[[SearchState], None] = lambda state: None


class Evolution(NamedTuple):
    """The outcome of a strategy at one stage.

    Attributes:
        candidate: The best candidate.
        loss: Its loss.
        accepted: (round, loss) for each round that improved on all before it.
        carried: See `Strategy.carried`.
        place: Where the candidate was evaluated (see `Evaluator.accept`); None if it is the one that the stage had
            before.
    """

    candidate: PyTree
    loss: float
    accepted: list[tuple[int, float]]
    carried: float | None
    place: tuple[int, int] | None


def evolve_stage(
    evaluator: Evaluator,
    index: int,
    strategy: Strategy,
    loss: float,
    key: Array,
    context: StageContext = StageContext(),  # noqa: B008 - frozen
    on_round: Callable[[int, float], None] = lambda evaluated, best: None,
) -> Evolution:
    """Runs a strategy at one stage; the stage itself keeps its candidate.

    Args:
        evaluator: The evaluator of the whole model.
        index: The stage.
        strategy: The strategy.
        loss: Loss of the present candidate.
        key: Key of this stage in this pass; rounds fold in their index.
        context: What the strategy may know of the stage.
        on_round: on_round(candidates evaluated, best loss) is called after every round.

    Returns:
        The best candidate, and how it was found.
    """
    candidate = evaluator.stages[index].candidate
    state = strategy.init(candidate, loss, context)
    best, accepted, place = loss, [], None
    for round_index in range(strategy.rounds):
        population, state = strategy.ask(state, jax.random.fold_in(key, round_index))
        losses = evaluator.losses(index, population)
        state = strategy.tell(state, population, losses)
        candidate, value = strategy.best(state)
        if value < best:
            best = value
            accepted.append((round_index, best))
            place = (strategy.rounds - round_index, int(np.argmin(losses)))
        on_round(len(losses), best)
    return Evolution(candidate, best, accepted, strategy.carried(state), place)


def _place(evaluator: Evaluator, order: Sequence[int], scales: Scales) -> None:
    for index in order:
        evaluator.accept(index, scales[evaluator.stages[index].name])


def consider(evaluator: Evaluator, order: Sequence[int], state: SearchState, proposal: Proposal) -> SearchState:
    """Takes a proposal for all stages, or a fraction of it, if that lowers the loss.

    Args:
        evaluator: The evaluator of the whole model.
        order: Indices of the searched stages.
        state: The state of the search.
        proposal: The proposed steps.

    Returns:
        The state afterwards.
    """
    assert state.loss is not None
    direction = proposal.steps
    moves = {evaluator.stages[index].name: evaluator.stages[index].move for index in order}
    best, taken, scales = state.loss, 0.0, state.scales
    for fraction in FRACTIONS:
        steps = {name: jax.tree.map(lambda step, f=fraction: f * step, direction[name]) for name in moves}
        trial = {name: move(state.scales[name], steps[name]) for name, move in moves.items()}
        _place(evaluator, order, trial)
        loss = evaluator.loss_of(order[0], trial[evaluator.stages[order[0]].name])
        if loss < best:
            best, taken, scales = loss, fraction, trial
    if taken != FRACTIONS[-1]:  # what stands in the evaluator
        _place(evaluator, order, scales)
    # Evolution takes random parts of the direction back; of one that was not taken, these parts are then tried.
    length = taken or -FRACTIONS[0]
    number = state.pass_index + 1
    events: list[Proposed | Accepted] = [Proposed(number, taken, best, tuple(proposal.losses))]
    if taken:
        events.append(Accepted(number, EVERY_STAGE, 0, best))
    return replace(
        state,
        scales=scales,
        direction={name: jax.tree.map(lambda step: length * step, steps) for name, steps in direction.items()},
        loss=best,
        evaluations=state.evaluations + len(FRACTIONS),
        log=(*state.log, *events),
    )


def _propose(
    evaluator: Evaluator, search: Search, state: SearchState, hooks: Hooks, order: Sequence[int], key: Array
) -> SearchState:
    """Gives the next proposer its turn. key: the pass's key."""
    proposer = search.proposers[state.proposed]
    done = replace(state, proposed=state.proposed + 1, progress={})
    if not proposer.every_pass and state.pass_index:
        return done

    def save(progress: Progress) -> None:
        hooks.on_stage(replace(state, progress=progress))

    # Stages fold in their indices, and proposers the numbers after them.
    earlier = sum(other.every_pass for other in search.proposers[: state.proposed])
    own_key = jax.random.fold_in(key, len(evaluator.stages) + earlier)
    listener = Listener(hooks.on_step, save)
    proposal = proposer.propose(state.scales, state.pass_index, own_key, state.progress, listener)
    if any(np.any(step) for step in jax.tree.leaves(proposal.steps)):
        done = consider(evaluator, order, done, proposal)
    hooks.on_stage(done)
    return done


def _evolve(
    evaluator: Evaluator, search: Search, state: SearchState, hooks: Hooks, index: int, key: Array
) -> SearchState:
    """Runs the strategy at a stage and records the result. key: the key of the stage in this pass."""
    name = evaluator.stages[index].name
    evaluated = 0

    def count(candidates: int, best: float) -> None:
        nonlocal evaluated
        evaluated += candidates
        hooks.on_round(name, candidates, best)

    assert state.loss is not None
    stage = evaluator.stages[index]
    context = StageContext(search.widths.get(name, ()), state.direction.get(name), stage.move, state.carried)
    found = evolve_stage(evaluator, index, search.strategy, state.loss, key, context, count)
    if found.place is not None:
        evaluator.accept(index, found.candidate, found.place)
    number = state.pass_index + 1
    events = [Accepted(number, name, round_index + 1, value) for round_index, value in found.accepted]
    return replace(
        state,
        scales={**state.scales, name: evaluator.stages[index].candidate},
        position=state.position + 1,
        loss=found.loss,
        carried=found.carried,
        evaluations=state.evaluations + evaluated,
        log=(*state.log, *events),
    )


def run_search(evaluator: Evaluator, search: Search, state: SearchState, hooks: Hooks = Hooks()) -> SearchState:
    """Continues a search to its end (CPT-V, section 3.3: blocks from last to first, `passes` times).

    Args:
        evaluator: The evaluator of the model as it was before the search.
        search: The settings of the search.
        state: The state to continue from; `initial_state` for a new search.
        hooks: Callbacks that follow the progress.

    Returns:
        The state at the end.
    """
    order = [i for i, stage in reversed(list(enumerate(evaluator.stages))) if stage.searchable]
    _place(evaluator, order, state.scales)
    if state.loss is None:
        start = evaluator.stages[order[0]].candidate
        held_out = search.held_out_loss(evaluator.stages) if search.held_out_loss else None
        loss = evaluator.loss_of(order[0], start)
        event = Start(loss, held_out)
        state = replace(state, loss=loss, best_held_out=held_out, evaluations=1, log=(*state.log, event))
        hooks.on_stage(state)
    while state.pass_index < search.strategy.passes and not _exhausted(state, search.patience):
        key = jax.random.fold_in(search.key, state.pass_index)
        while state.proposed < len(search.proposers):
            state = _propose(evaluator, search, state, hooks, order, key)
        index = order[state.position]
        state = _evolve(evaluator, search, state, hooks, index, jax.random.fold_in(key, index))
        visited = [evaluator.stages[i].name for i in order[: state.position]]
        idle = search.strategy.patience_of_stages
        if state.position == len(order) or (idle and _idle(state, visited) >= idle):
            state = _finish_pass(state, search.held_out_loss(evaluator.stages) if search.held_out_loss else None)
        hooks.on_stage(state)
    return state


def _exhausted(state: SearchState, patience: int | None) -> bool:
    return patience is not None and state.pass_index - state.best_pass >= patience


def _idle(state: SearchState, visited: Sequence[str]) -> int:
    """Counts the stages, from the last one visited in this pass backwards, that did not lower the loss."""
    number = state.pass_index + 1
    lowered = {event.stage for event in state.log if isinstance(event, Accepted) and event.number == number}
    return next((i for i, name in enumerate(reversed(visited)) if name in lowered), len(visited))


def _finish_pass(state: SearchState, held_out: float | None) -> SearchState:
    """Moves on to the next pass and remembers the present scales if they are the best so far."""
    assert state.loss is not None
    number = state.pass_index + 1
    better = held_out is None or state.best_held_out is None or held_out < state.best_held_out
    event = PassEnd(number, state.loss, held_out, state.evaluations)
    state = replace(state, pass_index=number, position=0, proposed=0, log=(*state.log, event))
    return replace(state, best_pass=number, best_held_out=held_out, best_scales=state.scales) if better else state
