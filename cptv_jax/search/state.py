"""Where a search stands between two stages."""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

from jaxtyping import PyTree

from cptv_jax.search.evaluator import Evaluator

Scales = dict[str, PyTree]  # candidates, or steps that move them, by stage name
Progress = dict[str, PyTree]  # of a proposal that is not finished, as its proposer has it


class Proposal(NamedTuple):
    """Steps for all stages at the start of a pass.

    losses: of the batches that it was made from, in order, for the log.
    """

    steps: Scales
    losses: tuple[float, ...] = ()


@dataclass(frozen=True)
class SearchState:
    """Where a search stands between two stages; all that is needed to go on.

    pass_index, position: the next stage to visit, as an index into the visiting order.
    proposed, direction: whether this pass has had its proposal, and the steps (see Stage.move) of it that were taken;
    where none were, steps that point away from half of it. progress: of the proposal that is being made. opened: how
    many openings have been tried.
    loss: of the present scales on the search batches (None before the first evaluation). evaluations: candidates
    evaluated so far.
    best_pass: 0 is the start; best_held_out: its loss on the held-out batches; best_scales: its scales.
    sigma: the deviation of random steps that the last stage ended with, of strategies that have one.
    log: a record of every accepted step and finished pass.
    """

    scales: Scales
    pass_index: int = 0
    position: int = 0
    proposed: bool = False
    direction: Scales = field(default_factory=dict)
    progress: Progress = field(default_factory=dict)
    opened: int = 0
    loss: float | None = None
    evaluations: int = 0
    best_pass: int = 0
    best_held_out: float | None = None
    best_scales: Scales = field(default_factory=dict)
    sigma: float | None = None
    log: tuple[dict[str, Any], ...] = ()


def initial_state(evaluator: Evaluator) -> SearchState:
    """The state of a search that has not begun: the scales that the stages have now."""
    scales = {stage.name: stage.candidate for stage in evaluator.stages if stage.searchable}
    return SearchState(scales, best_scales=scales)
