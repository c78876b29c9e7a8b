"""Strategies: they propose candidates and keep survivors, by ask and tell."""

from cptv_jax.search.strategies.base import Strategy
from cptv_jax.search.strategies.evol_q import EvolQ
from cptv_jax.search.strategies.evosax import Evosax
from cptv_jax.search.strategies.generational import Generational
from cptv_jax.search.strategies.guided import Guided

STRATEGIES = ("evol-q", "generational", "guided", "evosax")

__all__ = ["STRATEGIES", "EvolQ", "Evosax", "Generational", "Guided", "Strategy"]
