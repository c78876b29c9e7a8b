"""Strategies: they propose candidates and keep survivors, by ask and tell."""

from cptv_jax.search.strategies.base import Strategy
from cptv_jax.search.strategies.evol_q import EvolQ
from cptv_jax.search.strategies.generational import Generational

STRATEGIES = ("evol-q", "generational")

__all__ = ["STRATEGIES", "EvolQ", "Generational", "Strategy"]
