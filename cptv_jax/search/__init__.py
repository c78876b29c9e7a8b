"""CPT-V: evolutionary search over quantization scales, blind to architecture and base method."""

from cptv_jax.search.evaluator import Evaluator
from cptv_jax.search.objective import OBJECTIVES, Objective
from cptv_jax.search.proposals.gradient import Descent, GradientProposer
from cptv_jax.search.proposals.matching import MatchingLoss, channel_variances, paired
from cptv_jax.search.race import RacingEvaluator
from cptv_jax.search.strategies import STRATEGIES, EvolQ, Evosax, Generational, Guided, Strategy

__all__ = [
    "OBJECTIVES",
    "STRATEGIES",
    "Descent",
    "Evaluator",
    "EvolQ",
    "Evosax",
    "Generational",
    "GradientProposer",
    "Guided",
    "MatchingLoss",
    "Objective",
    "RacingEvaluator",
    "Strategy",
    "channel_variances",
    "paired",
]
