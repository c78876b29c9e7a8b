"""Where a search stands between two stages."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from jaxtyping import PyTree

from cptv_jax.search.evaluator import Evaluator
from cptv_jax.search.events import Log, log_from, to_record
from cptv_jax.search.proposals.base import Progress, Scales

_TREES = ("scales", "best_scales", "direction", "progress")


@dataclass(frozen=True)
class SearchState:
    """The state of a search between two stages; everything needed to continue it.

    Attributes:
        scales: The present candidates, by stage.
        pass_index: The pass, from 0 on.
        position: The next stage to visit, as an index into the visiting order.
        proposed: How many of the proposers have had their turn in this pass.
        direction: The steps (see `Stage.move`) of this pass's last proposal that were taken; if none were, steps that
            point away from half of it.
        progress: Progress of the unfinished proposal.
        loss: Loss of the present scales on the search batches; None before the first evaluation.
        evaluations: Candidates evaluated so far.
        best_pass: The best pass so far; 0 is the start.
        best_held_out: Its loss on the held-out batches.
        best_scales: Its candidates.
        carried: The number that the strategy passes on to the next stage.
        log: Every proposal, accepted step and finished pass.
    """

    scales: Scales
    pass_index: int = 0
    position: int = 0
    proposed: int = 0
    direction: Scales = field(default_factory=dict)
    progress: Progress = field(default_factory=dict)
    loss: float | None = None
    evaluations: int = 0
    best_pass: int = 0
    best_held_out: float | None = None
    best_scales: Scales = field(default_factory=dict)
    carried: float | None = None
    log: Log = ()

    def to_saved(self) -> tuple[dict[str, PyTree], dict[str, Any]]:
        """Splits the state into the parts that a checkpoint holds.

        Returns:
            Trees of arrays, without the empty ones, and plain data.
        """
        trees = {name: getattr(self, name) for name in _TREES if getattr(self, name)}
        plain = {name: value for name, value in vars(self).items() if name not in _TREES}
        return trees, {**plain, "log": [to_record(event) for event in self.log]}

    @classmethod
    def from_saved(cls, trees: Mapping[str, PyTree], plain: Mapping[str, Any]) -> "SearchState":
        """Joins the parts that `to_saved` made.

        Args:
            trees: The trees of arrays.
            plain: The plain data.

        Returns:
            The state.
        """
        return cls(**trees, **{**plain, "log": log_from(plain["log"])})


def initial_state(evaluator: Evaluator) -> SearchState:
    """Makes the state of a search that has not begun.

    Args:
        evaluator: The evaluator, with the stages as they are before the search.

    Returns:
        The state, whose scales are the present candidates of the stages.
    """
    scales = {stage.name: stage.candidate for stage in evaluator.stages if stage.searchable}
    return SearchState(scales, best_scales=scales)
