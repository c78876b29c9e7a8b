"""What the search asks of a strategy, and what a strategy decides where the configuration is silent."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import jax
import numpy as np
from jaxtyping import PyTree

from cptv_jax.runtime.stages import scale_by
from cptv_jax.search.proposals.base import ProposerOptions

Move = Callable[[PyTree, PyTree], PyTree]


@dataclass(frozen=True)
class Defaults:
    """What null fields of a search's configuration mean.

    Attributes:
        objective: What judges candidates.
        sites: Patterns of the sites that are searched; None means the model family's own.
        offsets: Whether the candidates hold more than scales: zero points and the like, and roundings of weights.
        images: About how many images judge candidates; None means all that are not held out.
    """

    objective: str = "infonce"
    sites: tuple[str, ...] | None = None
    offsets: bool = False
    images: int | None = None


@dataclass(frozen=True)
class StageContext:
    """What a strategy may know of the stage that it searches.

    Attributes:
        widths: Bits of the searched weights, in the order of their sites.
        direction: Steps of the candidate's structure that the pass's proposal took here, or that point away from one
            that was not taken; None without a proposal.
        move: Moves a candidate by steps (see `cptv_jax.Stage`).
        carried: What `Strategy.carried` told of the stage before; None at the first.
    """

    widths: tuple[int, ...] = ()
    direction: PyTree = None
    move: Move = scale_by
    carried: float | None = None


NO_CONTEXT = StageContext()


class Strategy:
    """Evolution of one stage's candidate at a time; subclasses are options too (see `cptv_jax.options.options`).

    Methods are pure, and the state is opaque to the search. A candidate is a pytree of arrays; it is moved by
    `StageContext.move`, or leaf by leaf where all of its leaves are positive scales.

    Attributes:
        name: What configurations call the strategy.
        defaults: What a search by this strategy does where the configuration is silent.
        moves_offsets: Whether it can search candidates that hold more than positive scales.
        passes: Sweeps over the stages, last stage first; 0 means that there is no search.
        rounds: How often `ask` and `tell` alternate at each stage in a pass.

    Example:
        >>> @options
        ... class Halving(Strategy):
        ...     '''Tries scales of half the size.'''
        ...     name: ClassVar[str] = "halving"
        ...     passes: int = 1
        ...     rounds: int = 1
        ...     ...
        >>> register_strategy(Halving)
    """

    name: ClassVar[str]
    defaults: ClassVar[Defaults] = Defaults()
    moves_offsets: ClassVar[bool] = False
    passes: int
    rounds: int

    @property
    def candidates(self) -> int:
        """How many candidates a round asks for at most; bounds memory."""
        return 1

    @property
    def patience_of_stages(self) -> int | None:
        """After how many stages in a row that did not lower the loss a pass ends; None goes through all."""
        return None

    def complete(self, objective: str | None) -> Self:
        """Fills in options that depend on the rest of the search's configuration.

        Args:
            objective: What judges, where the configuration names it.

        Returns:
            The strategy without options that depend on it.
        """
        return self

    def proposers(self) -> Sequence[ProposerOptions]:
        """What proposes steps for all stages at the start of a pass, in this order."""
        return ()

    def init(self, candidate: PyTree, loss: float, context: StageContext = NO_CONTEXT) -> Any:
        """Begins at a stage.

        Args:
            candidate: The stage's present candidate.
            loss: Its loss.
            context: What else is known of the stage.

        Returns:
            The state.
        """
        raise NotImplementedError

    def ask(self, state: Any, key: jax.Array) -> tuple[PyTree, Any]:
        """Proposes candidates.

        Args:
            state: The state.
            key: This round's own.

        Returns:
            The candidates to evaluate, stacked along a leading axis, and the state to tell their losses.
        """
        raise NotImplementedError

    def tell(self, state: Any, population: PyTree, losses: np.ndarray) -> Any:
        """Takes in the losses of what was asked for.

        Args:
            state: As `ask` returned it.
            population: The candidates [K, ...].
            losses: Their losses [K], float64; infinite where a candidate was dropped.

        Returns:
            The state, in which of equal losses the elder candidate counts.
        """
        raise NotImplementedError

    def best(self, state: Any) -> tuple[PyTree, float]:
        """The candidate with the least loss so far, and that loss."""
        raise NotImplementedError

    def carried(self, state: Any) -> float | None:
        """A number that the next stage is told, such as a deviation that has adapted."""
        return None
