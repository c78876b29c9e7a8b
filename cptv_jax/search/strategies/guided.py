"""Evolution along a direction: children that go further or back on a proposal, mix with what was before, or mutate."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar, Self

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree
from pydantic import Field

from cptv_jax.options import options
from cptv_jax.search.objective import ObjectiveName
from cptv_jax.search.proposals.base import ClosedForms, Gradients, ProposerOptions
from cptv_jax.search.strategies.base import NO_CONTEXT, Defaults, Move, StageContext, Strategy
from cptv_jax.search.strategies.generational import TARGET_SUCCESS

_KINDS = 5  # of children: along the direction, elements taken back, random, along by parameter, parameters taken back
_RANDOM = 2
_PROPOSING = "infonce"  # proposes best, where KL judges best
_STRIDE = 0.5  # deviation of how far a child goes along the direction, in lengths of it


@dataclass(frozen=True)
class State:
    """Where the evolution stands.

    Attributes:
        parent: The best candidate so far.
        loss: Its loss.
        sigma: Deviation of random steps (see `Stage.move`).
        direction: Steps that led to the first parent, in the structure of a candidate.
        move: The stage's `move`.
    """

    parent: PyTree
    loss: float
    sigma: float
    direction: PyTree
    move: Move


@partial(jax.jit, static_argnums=(0, 5))
def _children(move: Move, parent: PyTree, direction: PyTree, sigma: Float[Array, ""], key: Array, count: int) -> PyTree:
    leaves, structure = jax.tree.flatten(direction)

    def child(index: Array, key: Array) -> PyTree:
        key, stride_key = jax.random.split(key)
        stride = _STRIDE * jax.random.normal(stride_key)
        steps = []
        for leaf, leaf_key in zip(leaves, jax.random.split(key, len(leaves)), strict=True):
            back = -leaf * jax.random.bernoulli(leaf_key, 0.5, leaf.shape)
            noise = sigma * jax.random.normal(leaf_key, leaf.shape)
            own = _STRIDE * jax.random.normal(leaf_key) * leaf
            whole = -leaf * jax.random.bernoulli(leaf_key)
            steps.append(jnp.stack([stride * leaf, back, noise, own, whole])[index % _KINDS])
        return move(parent, jax.tree.unflatten(structure, steps))

    return jax.vmap(child)(jnp.arange(count), jax.random.split(key, count))


@options
class Guided(Strategy):
    """Closed forms and gradients propose for all stages at once, evolution goes on from there, the true loss decides.

    A (1 + children) evolution strategy around the proposed direction. In every group of five children, one goes further
    or back along the direction, one takes back a random half of it (crossover with the candidate that the proposal
    started from), and one takes a random step; the fourth goes along the direction by a separate length for each leaf
    of the candidate, and the fifth takes some of these back whole. sigma follows the success of the random ones
    (one-fifth rule), from one stage to the next.

    Example:
        >>> config = QuantizeConfig(search=SearchConfig(strategy=Guided(passes=2, steps=60)))
    """

    name: ClassVar[str] = "guided"
    # KL, as infoNCE also falls where outputs move apart that the teacher has close together; few images, as these only
    # judge proposals that gradients on all images make.
    defaults: ClassVar[Defaults] = Defaults(objective="kl", sites=("*.weight",), offsets=True, images=200)
    moves_offsets: ClassVar[bool] = True
    passes: int = Field(default=1, ge=1)
    """Sweeps over the blocks, last block first; each begins with a proposal."""
    rounds: int = Field(default=1, ge=1)
    """Generations per block and pass."""
    children: int = Field(default=3, ge=1)
    """Candidates per generation."""
    sigma: float = Field(default=0.01, gt=0, allow_inf_nan=False)
    """Deviation of random steps at first, in log-scale."""
    idle_stages: int | None = Field(default=4, ge=1)
    """End a pass after this many blocks in a row that gained nothing over its proposal; null visits all blocks."""
    steps: int = Field(default=400, ge=1)
    """Optimizer steps per pass."""
    rate: float = Field(default=0.0015, gt=0, allow_inf_nan=False)
    """Rate of the optimizer at the start, in log-scale; it falls along a half cosine over all passes."""
    batch: int = Field(default=10, ge=2)
    """Images per optimizer step; all calibration images except the held-out ones take turns."""
    objective: ObjectiveName | None = None
    """Objective that is differentiated; null means search.judge.objective, and infonce if that is null too."""
    matching: float = Field(default=100.0, ge=0, allow_inf_nan=False)
    """Weight, added to the objective, of the distance between the outputs of all stages and the teacher's (mean squared
    error relative to the variance)."""
    mirror: bool = True
    """Also show the optimizer mirror images."""
    mixup: bool = True
    """Show the optimizer images mixed in pairs, for which the teacher is evaluated too."""

    @property
    def candidates(self) -> int:
        """The number of children in a generation."""
        return self.children

    @property
    def patience_of_stages(self) -> int | None:
        """The number of stages in a row without a lower loss after which a pass ends; None visits all."""
        return self.idle_stages

    def complete(self, objective: str | None) -> Self:
        """Fills in the objective that is differentiated.

        Args:
            objective: The objective that judges; None if the configuration does not name it.

        Returns:
            The strategy with its `objective` set: its own, else the judging one, else infonce.
        """
        return replace(self, objective=self.objective or objective or _PROPOSING)

    def proposers(self) -> Sequence[ProposerOptions]:
        """Lists the proposers that the strategy asks for.

        Returns:
            Closed forms, then gradients.
        """
        objective = self.objective or _PROPOSING
        return ClosedForms(), Gradients(
            self.steps, self.rate, self.batch, objective, self.matching, self.mirror, self.mixup
        )

    def init(self, candidate: PyTree, loss: float, context: StageContext = NO_CONTEXT) -> State:
        """Begins at a stage.

        Args:
            candidate: The stage's present candidate.
            loss: Its loss.
            context: Further facts about the stage.

        Returns:
            The state.
        """
        candidate = jax.tree.map(jnp.asarray, candidate)
        direction = jax.tree.map(jnp.zeros_like, candidate) if context.direction is None else context.direction
        sigma = self.sigma if context.carried is None else context.carried
        return State(candidate, loss, sigma, direction, context.move)

    def ask(self, state: State, key: Array) -> tuple[PyTree, State]:
        """Proposes children along the direction and at random.

        Args:
            state: The state.
            key: This round's key.

        Returns:
            The candidates [K, ...] to evaluate, and the state to pass to `tell`.
        """
        sigma = jnp.float32(state.sigma)
        return _children(state.move, state.parent, state.direction, sigma, key, self.children), state

    def tell(self, state: State, population: PyTree, losses: np.ndarray) -> State:
        """Keeps the best candidate and adapts the deviation.

        Args:
            state: The state that `ask` returned.
            population: The candidates [K, ...].
            losses: Their losses [K], float64.

        Returns:
            The state.
        """
        random = losses[_RANDOM::_KINDS]
        success = float(np.mean(random < state.loss)) if len(random) else TARGET_SUCCESS
        state = replace(state, sigma=state.sigma * math.exp((success - TARGET_SUCCESS) / 2))
        winner = int(np.argmin(losses))
        if losses[winner] >= state.loss:
            return state
        return replace(state, parent=jax.tree.map(lambda leaf: leaf[winner], population), loss=float(losses[winner]))

    def best(self, state: State) -> tuple[PyTree, float]:
        """Returns the candidate with the least loss so far.

        Args:
            state: The state.

        Returns:
            The candidate, and its loss.
        """
        return state.parent, state.loss

    def carried(self, state: State) -> float:
        """Returns the adapted deviation for the next stage.

        Args:
            state: The state at the end of a stage.

        Returns:
            The deviation of random steps.
        """
        return state.sigma
