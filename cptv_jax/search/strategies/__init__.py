"""Strategies: they propose candidates and keep survivors, by ask and tell."""

from cptv_jax.search.strategies.base import Defaults, StageContext, Strategy
from cptv_jax.search.strategies.evol_q import EvolQ
from cptv_jax.search.strategies.evosax import Evosax
from cptv_jax.search.strategies.generational import Generational
from cptv_jax.search.strategies.guided import Guided
from cptv_jax.search.strategies.none import NoSearch
from cptv_jax.search.strategies.registry import STRATEGIES, register_strategy

__all__ = [
    "STRATEGIES",
    "Defaults",
    "EvolQ",
    "Evosax",
    "Generational",
    "Guided",
    "NoSearch",
    "StageContext",
    "Strategy",
    "register_strategy",
]
