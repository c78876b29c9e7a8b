"""The protocol of proposers, and the options with which a strategy asks for one."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import jax
from jaxtyping import PyTree

Scales = dict[str, PyTree]  # candidates, or steps that move them, by stage name
Progress = dict[str, PyTree]  # of a proposal that is not finished, as its proposer has it


class Proposal(NamedTuple):
    """Steps for all stages.

    Attributes:
        steps: Steps by stage, in the structure of its candidate (see `cptv_jax.Stage`).
        losses: Losses of the batches that the steps were made from, in order, for the log.
    """

    steps: Scales
    losses: tuple[float, ...] = ()


class Listener(NamedTuple):
    """Callbacks that follow the progress of a proposer.

    Attributes:
        on_step: on_step(the present activity, in words; the number of the proposer's `steps` that it took).
        on_progress: on_progress(the progress from which `propose` can continue), for saving.
    """

    on_step: Callable[[str, int], None] = lambda text, steps: None
    on_progress: Callable[[Progress], None] = lambda progress: None


class Proposer(Protocol):
    """Proposes steps for the candidates of all stages at once, at the start of a pass."""

    @property
    def every_pass(self) -> bool:
        """Whether it proposes in every pass, or only in the first."""

    @property
    def steps(self) -> int:
        """The number of steps of a proposal, for the progress bar."""

    def propose(
        self,
        scales: Scales,
        pass_index: int,
        key: jax.Array,
        progress: Progress | None = None,
        listener: Listener = Listener(),  # noqa: B008 - immutable
    ) -> Proposal:
        """Proposes steps.

        Args:
            scales: The present candidates, by stage.
            pass_index: The pass, from 0 on.
            key: The key of this proposal.
            progress: The last progress that the listener received, to continue as if without interruption.
            listener: Callbacks that follow the progress.

        Returns:
            The steps.
        """


@dataclass(frozen=True)
class ClosedForms:
    """Asks for closed-form proposals in the first pass.

    They are grids of weights with least squared error and, if roundings are searched, roundings that keep a layer's
    outputs.
    """


@dataclass(frozen=True)
class Gradients:
    """Asks for Adam on the steps of all candidates at once, in every pass.

    Attributes:
        steps: Optimizer steps per pass.
        rate: Rate at the start; a step of 0.01 is one percent of a scale.
        batch: Images per step; all calibration images except the held-out ones take turns.
        objective: The objective that is differentiated.
        matching: Weight, added to the objective, of the distance between the outputs of all stages and the teacher's.
        mirror: Also show mirror images.
        mixup: Show images mixed in pairs.
    """

    steps: int = 400
    rate: float = 0.0015
    batch: int = 10
    objective: str = "infonce"
    matching: float = 100.0
    mirror: bool = True
    mixup: bool = True


ProposerOptions = ClosedForms | Gradients


def gradient_steps(asked: Sequence[ProposerOptions]) -> int:
    """Counts optimizer steps.

    Args:
        asked: The options that a strategy asks for.

    Returns:
        The number of optimizer steps per pass.
    """
    return sum(one.steps for one in asked if isinstance(one, Gradients))
