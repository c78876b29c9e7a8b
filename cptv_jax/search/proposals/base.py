"""What the search asks of a proposer, and the options by which a strategy asks for one."""

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
        steps: By stage, in the structure of its candidate (see `cptv_jax.Stage`).
        losses: Of the batches that they were made from, in order, for the log.
    """

    steps: Scales
    losses: tuple[float, ...] = ()


class Listener(NamedTuple):
    """Whom a proposer tells how far it is.

    Attributes:
        on_step: on_step(what is being done, in words; how many of its `steps` that took).
        on_progress: Called with what `propose` needs to go on from here, for saving.
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
        """How much work a proposal is, for the progress bar."""

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
            key: This proposal's own.
            progress: What the listener was last told, to go on from there as if nothing had been between.
            listener: Whom to tell how far it is.

        Returns:
            The steps.
        """


@dataclass(frozen=True)
class ClosedForms:
    """Asks for grids of weights with least squared error and, where roundings are searched, for roundings that keep a
    layer's outputs; both in closed form, in the first pass."""


@dataclass(frozen=True)
class Gradients:
    """Asks for Adam on the steps of all candidates at once, in every pass.

    Attributes:
        steps: Optimizer steps per pass.
        rate: At the start; a step of 0.01 is one percent of a scale.
        batch: Images per step; all calibration images but those held out take turns.
        objective: What is differentiated.
        matching: Weight, beside the objective, of how far the outputs of all stages are from the teacher's.
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
        asked: What a strategy asks for.

    Returns:
        How many optimizer steps a pass takes.
    """
    return sum(one.steps for one in asked if isinstance(one, Gradients))
