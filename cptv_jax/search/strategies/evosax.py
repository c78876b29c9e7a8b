"""Evolution strategies of the library evosax (an optional dependency), behind ask and tell."""

from dataclasses import dataclass, replace
from functools import lru_cache
from importlib.util import find_spec
from typing import Any, ClassVar, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, PyTree
from pydantic import Field

from cptv_jax.errors import InputError
from cptv_jax.options import options
from cptv_jax.runtime.stages import scale_by
from cptv_jax.search.strategies.base import NO_CONTEXT, StageContext, Strategy

# Distributions that need a mean to start from and nothing else.
Algorithm = Literal["Sep_CMA_ES", "CMA_ES", "SNES", "Open_ES", "PGPE"]
ALGORITHMS: tuple[Algorithm, ...] = get_args(Algorithm)
_IN_PAIRS = ("Open_ES", "PGPE")  # draw antithetic pairs, and follow the gradient that these estimate


@lru_cache(maxsize=16)
def _algorithm(name: str, children: int, structure: Any, shapes: tuple[tuple[int, ...], ...]) -> Any:
    """evosax's object for candidates of these shapes; kept, as evosax compiles once for each object."""
    from evosax import algorithms  # optional

    options = {"optimizer": optax.adam(1.0)} if name in _IN_PAIRS else {}  # a step of one deviation
    solution = jax.tree.unflatten(structure, [jnp.zeros(shape) for shape in shapes])
    return getattr(algorithms, name)(population_size=children, solution=solution, **options)


@dataclass(frozen=True)
class State:
    """Where the evolution stands.

    Attributes:
        start: The candidate that steps are relative to.
        inner: evosax's state, for steps in units of sigma.
        parent: The best candidate so far.
        loss: Its loss.
        told: Number of rounds so far.
    """

    start: PyTree
    inner: Any
    parent: PyTree
    loss: float
    told: int = 0


@jax.jit
def _moved(start: PyTree, steps: PyTree, sigma: Array) -> PyTree:
    return jax.vmap(lambda one: scale_by(start, jax.tree.map(lambda step: sigma * step, one)))(steps)


@jax.jit
def _steps(start: PyTree, population: PyTree, sigma: Array) -> PyTree:
    return jax.tree.map(lambda old, new: jnp.log(new / old) / sigma, start, population)


@options
class Evosax(Strategy):
    """A search distribution of the library evosax over log-scales, around the stage's candidate at first.

    Raises:
        InputError: If evosax is not installed, or if the number of children is odd for an algorithm that draws pairs.

    Example:
        >>> config = QuantizeConfig(search=SearchConfig(strategy=Evosax(algorithm="CMA_ES")))
    """

    name: ClassVar[str] = "evosax"
    passes: int = Field(default=10, ge=1)
    """Sweeps over the blocks, last block first."""
    rounds: int = Field(default=3, ge=1)
    """Generations per block and pass."""
    children: int = Field(default=8, ge=1)
    """Candidates per generation; an even number for Open_ES and PGPE, which draw pairs."""
    algorithm: Algorithm = "Sep_CMA_ES"
    """Search distribution to evolve."""
    sigma: float = Field(default=0.01, gt=0, allow_inf_nan=False)
    """Deviation of the distribution at first, in log-scale."""

    def __post_init__(self) -> None:
        if find_spec("evosax") is None:
            raise InputError(
                "search.strategy evosax needs the package evosax; install cptv_jax[evosax], or choose another strategy"
            )
        if self.algorithm in _IN_PAIRS and self.children % 2:
            raise InputError(
                f"search.strategy.children is {self.children}, but {self.algorithm} draws pairs; set an even number"
            )

    @property
    def candidates(self) -> int:
        """The number of children in a generation."""
        return self.children

    def _of(self, candidate: PyTree) -> Any:
        leaves, structure = jax.tree.flatten(candidate)
        return _algorithm(self.algorithm, self.children, structure, tuple(jnp.shape(leaf) for leaf in leaves))

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
        algorithm = self._of(candidate)
        # The key is not used by these algorithms: the mean is given.
        inner = algorithm.init(jax.random.key(0), jax.tree.map(jnp.zeros_like, candidate), algorithm.default_params)
        return State(candidate, inner, candidate, loss)

    def ask(self, state: State, key: Array) -> tuple[PyTree, State]:
        """Draws candidates from the search distribution.

        Args:
            state: The state.
            key: This round's key.

        Returns:
            The candidates [K, ...] to evaluate, and the state to pass to `tell`.
        """
        algorithm = self._of(state.start)
        steps, inner = algorithm.ask(key, state.inner, algorithm.default_params)
        return _moved(state.start, steps, jnp.float32(self.sigma)), replace(state, inner=inner)

    def tell(self, state: State, population: PyTree, losses: np.ndarray) -> State:
        """Updates the search distribution and the best candidate.

        Args:
            state: The state that `ask` returned.
            population: The candidates [K, ...].
            losses: Their losses [K], float64.

        Returns:
            The state.
        """
        algorithm = self._of(state.start)
        parameters, key = algorithm.default_params, jax.random.key(state.told)  # the key is not used here either
        finite = np.where(np.isfinite(losses), losses, np.finfo(np.float32).max)
        steps = _steps(state.start, population, jnp.float32(self.sigma))
        inner, _ = algorithm.tell(key, steps, jnp.asarray(finite, jnp.float32), state.inner, parameters)
        state = replace(state, inner=inner, told=state.told + 1)
        winner = int(np.argmin(losses))
        if not losses[winner] < state.loss:
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
