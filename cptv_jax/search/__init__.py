"""CPT-V: evolutionary search over quantization scales, blind to architecture and base method."""

from cptv_jax.search.evaluator import Evaluator
from cptv_jax.search.objective import OBJECTIVES, Objective
from cptv_jax.search.proposals.base import ClosedForms, Gradients, Proposal, Proposer
from cptv_jax.search.proposals.gradient import Descent, GradientProposer
from cptv_jax.search.proposals.matching import MatchingLoss, channel_variances, paired
from cptv_jax.search.race import RacingEvaluator
from cptv_jax.search.strategies import (
    STRATEGIES,
    Defaults,
    EvolQ,
    Evosax,
    Generational,
    Guided,
    NoSearch,
    StageContext,
    Strategy,
    register_strategy,
)

__all__ = [
    "OBJECTIVES",
    "STRATEGIES",
    "ClosedForms",
    "Defaults",
    "Descent",
    "Evaluator",
    "EvolQ",
    "Evosax",
    "Generational",
    "GradientProposer",
    "Gradients",
    "Guided",
    "MatchingLoss",
    "NoSearch",
    "Objective",
    "Proposal",
    "Proposer",
    "RacingEvaluator",
    "StageContext",
    "Strategy",
    "channel_variances",
    "paired",
    "register_strategy",
]
