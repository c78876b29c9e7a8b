"""Strategies by name."""

from typing import TypeVar

from cptv_jax.registry import Registry
from cptv_jax.search.strategies.base import Strategy
from cptv_jax.search.strategies.evol_q import EvolQ
from cptv_jax.search.strategies.evosax import Evosax
from cptv_jax.search.strategies.generational import Generational
from cptv_jax.search.strategies.guided import Guided
from cptv_jax.search.strategies.none import NoSearch

STRATEGIES: Registry[type[Strategy]] = Registry("strategy")
S = TypeVar("S", bound=type[Strategy])


def register_strategy(strategy: S) -> S:
    """Makes a strategy known to configurations, the command line and the benches; also a class decorator.

    Args:
        strategy: A class of options (see `cptv_jax.options.options`) that subclasses Strategy and has a `name`.

    Returns:
        The class.

    Raises:
        InputError: If another strategy has this name.

    Example:
        >>> register_strategy(Halving)
        >>> config = QuantizeConfig(search=SearchConfig(strategy=Halving()))
    """
    STRATEGIES.register(strategy.name, strategy)
    return strategy


for _strategy in (EvolQ, Generational, Guided, Evosax, NoSearch):
    register_strategy(_strategy)
