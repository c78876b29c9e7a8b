"""The interface between the search and its strategies, and the defaults that a strategy sets for a search."""

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
    """Values for null fields of a search's configuration.

    Attributes:
        objective: The objective that judges candidates.
        sites: Patterns of the sites that are searched; None means the model family's own.
        offsets: Whether the candidates hold more than scales: zero points and the like, and roundings of weights.
        images: About how many images judge candidates; None means all that are not held out.

    Example:
        >>> defaults: ClassVar[Defaults] = Defaults(objective="kl", sites=("*.weight",))
    """

    objective: str = "infonce"
    sites: tuple[str, ...] | None = None
    offsets: bool = False
    images: int | None = None


@dataclass(frozen=True)
class StageContext:
    """The facts that a strategy may use about the stage that it searches.

    Attributes:
        widths: Bits of the searched weights, in the order of their sites.
        direction: Steps in the candidate's structure that the pass's proposal took here, or that point away from one
            that was not taken; None without a proposal.
        move: Moves a candidate by steps (see `cptv_jax.Stage`).
        carried: The value of `Strategy.carried` at the stage before; None at the first.

    Example:
        >>> state = strategy.init(candidate, loss, StageContext(widths=(4, 4)))
    """

    widths: tuple[int, ...] = ()
    direction: PyTree = None
    move: Move = scale_by
    carried: float | None = None


NO_CONTEXT = StageContext()


class Strategy:
    """Evolution of one stage's candidate at a time; subclasses are options too (see `cptv_jax.options.options`).

    Methods are pure, and the state is opaque to the search. A candidate is a pytree of arrays; it is moved by
    `StageContext.move`, or leaf by leaf if all of its leaves are positive scales.

    Attributes:
        name: The strategy's name in configurations.
        defaults: Values for null fields of the search's configuration.
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
        """The largest number of candidates that a round asks for; it bounds memory."""
        return 1

    @property
    def patience_of_stages(self) -> int | None:
        """The number of stages in a row without a lower loss after which a pass ends; None visits all."""
        return None

    def complete(self, objective: str | None) -> Self:
        """Fills in options that depend on the rest of the search's configuration.

        Args:
            objective: The objective that judges; None if the configuration does not name it.

        Returns:
            The strategy with these options set.
        """
        return self

    def proposers(self) -> Sequence[ProposerOptions]:
        """Lists the proposers that the strategy asks for.

        Returns:
            Options of what proposes steps for all stages at the start of a pass, in this order.
        """
        return ()

    def init(self, candidate: PyTree, loss: float, context: StageContext = NO_CONTEXT) -> Any:
        """Begins at a stage.

        Args:
            candidate: The stage's present candidate.
            loss: Its loss.
            context: Further facts about the stage.

        Returns:
            The state.
        """
        raise NotImplementedError

    def ask(self, state: Any, key: jax.Array) -> tuple[PyTree, Any]:
        """Proposes candidates.

        Args:
            state: The state.
            key: This round's key.

        Returns:
            The candidates to evaluate [K, ...], stacked along a leading axis, and the state to pass to `tell`.
        """
        raise NotImplementedError

    def tell(self, state: Any, population: PyTree, losses: np.ndarray) -> Any:
        """Takes in the losses of the proposed candidates.

        Args:
            state: The state that `ask` returned.
            population: The candidates [K, ...].
            losses: Their losses [K], float64; infinite for a candidate that was dropped.

        Returns:
            The state; among candidates of equal loss the older one wins.
        """
        raise NotImplementedError

    def best(self, state: Any) -> tuple[PyTree, float]:
        """Returns the candidate with the least loss so far.

        Args:
            state: The state.

        Returns:
            The candidate, and its loss.
        """
        raise NotImplementedError

    def carried(self, state: Any) -> float | None:
        """Returns a number to pass on to the next stage, such as an adapted deviation.

        Args:
            state: The state at the end of a stage.

        Returns:
            The number; None if there is none.
        """
        return None
