"""The search: passes over the stages, last to first, resumable after every stage."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
from jaxtyping import Array, PyTree

from cptv_jax.search.evaluator import Evaluator
from cptv_jax.search.strategies import Strategy

Scales = dict[str, PyTree]  # candidates by stage name


@dataclass(frozen=True)
class SearchState:
    """Where a search stands between two stages; all that is needed to go on.

    pass_index, position: the next stage to visit, as an index into the visiting order. loss: of the present scales on
    the search batches (None before the first evaluation). evaluations: candidates evaluated so far.
    best_pass: 0 is the start; best_held_out: its loss on the held-out batches; best_scales: its scales.
    log: a record of every accepted step and finished pass.
    """

    scales: Scales
    pass_index: int = 0
    position: int = 0
    loss: float | None = None
    evaluations: int = 0
    best_pass: int = 0
    best_held_out: float | None = None
    best_scales: Scales = field(default_factory=dict)
    log: tuple[dict[str, Any], ...] = ()


def initial_state(evaluator: Evaluator) -> SearchState:
    """The state of a search that has not begun: the scales that the stages have now."""
    scales = {stage.name: stage.candidate for stage in evaluator.stages if stage.searchable}
    return SearchState(scales, best_scales=scales)


def evolve_stage(
    evaluator: Evaluator,
    index: int,
    strategy: Strategy,
    loss: float,
    key: Array,
    on_round: Callable[[int, float], None] = lambda evaluated, best: None,
) -> tuple[PyTree, float, list[tuple[int, float]]]:
    """Runs a strategy at one stage.

    Returns the best candidate, its loss, and (round, loss) for each round that improved on all before it.
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
    return candidate, best, accepted


def run_search(
    evaluator: Evaluator,
    strategy_of: Callable[[str], Strategy],
    passes: int,
    key: Array,
    state: SearchState,
    held_out_loss: Callable[[Sequence[Any]], float] | None = None,
    on_round: Callable[[str, int, float], None] = lambda stage, evaluated, best: None,
    on_stage: Callable[[SearchState], None] = lambda state: None,
) -> SearchState:
    """Continues a search from `state` to its end (CPT-V, section 3.3: blocks from last to first, `passes` times).

    strategy_of: the strategy for a stage, by name. key: of the whole search; each pass, stage and round folds in its
    index, so that a resumed search draws what an uninterrupted one would.
    held_out_loss: loss of a list of stages on images that the search does not see; it picks the best among the start
    and the passes. Without it the last pass is the best.
    on_stage: called with the state after every stage, for saving; the scales in it may be saved as float32.
    """
    order = [i for i, stage in reversed(list(enumerate(evaluator.stages))) if stage.searchable]
    for index in order:
        name = evaluator.stages[index].name
        evaluator.accept(index, state.scales[name])
    if state.loss is None:
        start = evaluator.stages[order[0]].candidate
        held_out = held_out_loss(evaluator.stages) if held_out_loss else None
        loss = evaluator.loss_of(order[0], start)
        record = {"event": "start", "loss": loss, "held_out": held_out}
        state = replace(state, loss=loss, best_held_out=held_out, evaluations=1, log=(*state.log, record))
        on_stage(state)
    while state.pass_index < passes:
        index = order[state.position]
        name = evaluator.stages[index].name
        stage_key = jax.random.fold_in(jax.random.fold_in(key, state.pass_index), index)
        evaluated = 0

        def count(candidates: int, best: float, name: str = name) -> None:
            nonlocal evaluated
            evaluated += candidates
            on_round(name, candidates, best)

        assert state.loss is not None
        candidate, loss, accepted = evolve_stage(evaluator, index, strategy_of(name), state.loss, stage_key, count)
        evaluator.accept(index, candidate)
        records = [
            {"event": "accepted", "pass": state.pass_index + 1, "stage": name, "round": round_index + 1, "loss": value}
            for round_index, value in accepted
        ]
        state = replace(
            state,
            scales={**state.scales, name: evaluator.stages[index].candidate},
            position=state.position + 1,
            loss=loss,
            evaluations=state.evaluations + evaluated,
            log=(*state.log, *records),
        )
        if state.position == len(order):
            state = _finish_pass(state, held_out_loss(evaluator.stages) if held_out_loss else None)
        on_stage(state)
    return state


def _finish_pass(state: SearchState, held_out: float | None) -> SearchState:
    """Moves on to the next pass and remembers the present scales if they are the best so far."""
    number = state.pass_index + 1
    better = held_out is None or state.best_held_out is None or held_out < state.best_held_out
    record = {"event": "pass", "pass": number, "loss": state.loss, "held_out": held_out}
    record["evaluations"] = state.evaluations
    state = replace(state, pass_index=number, position=0, log=(*state.log, record))
    return replace(state, best_pass=number, best_held_out=held_out, best_scales=state.scales) if better else state
