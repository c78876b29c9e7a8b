"""Options of block reconstruction."""

import dataclasses
from typing import Literal

from pydantic import Field

from cptv_jax.options import options


@options
class ReconstructionConfig:
    """Block reconstruction after the base method; a rate of 0 leaves its parameters as they are.

    Example:
        >>> ReconstructionConfig(steps=300, batch=32, rounding_rate=0)
    """

    steps: int | None = Field(default=None, ge=0)
    """Optimizer steps per stage; 0 turns reconstruction off; null takes the base method's default (0 for most)."""
    batch: int = Field(default=16, ge=1)
    """Images per step."""
    images: int | None = Field(default=None, ge=1)
    """How many calibration images to use; null means all."""
    scale_rate: float = Field(default=5e-3, ge=0, allow_inf_nan=False)
    """Rate of the logarithm of scales."""
    zero_point_rate: float = Field(default=2e-2, ge=0, allow_inf_nan=False)
    """Rate of zero points, in codes (they stay integers)."""
    rounding_rate: float = Field(default=3e-3, ge=0, allow_inf_nan=False)
    """Rate of quantized weights, in steps of their channel."""
    weight_rate: float = Field(default=1e-3, ge=0, allow_inf_nan=False)
    """Rate of arrays that stay in float (biases, LayerNorm), absolute."""
    low_rank_rate: float = Field(default=1e-3, ge=0, allow_inf_nan=False)
    """Rate of low-rank terms, absolute."""
    easy_first: float | None = Field(default=None, ge=0, le=1)
    """Share of the images, those with the least error, that a stage begins with, growing to all in half of the steps;
    null takes the base method's default (all for most)."""
    float_input: float = Field(default=0.5, ge=0, le=1)
    """Probability that an element of a stage's input is the float model's instead of the quantized one's."""
    importance: Literal["fisher", "none"] = "fisher"
    """Weights of the squared error."""


NO_RECONSTRUCTION = ReconstructionConfig(steps=0, easy_first=1.0)


def complete(config: ReconstructionConfig, defaults: ReconstructionConfig) -> ReconstructionConfig:
    """Fills the null fields of a configuration.

    Args:
        config: The configuration.
        defaults: The values to take where it is null.

    Returns:
        The configuration; only fields that are null in both are still null.
    """
    given = {name: value for name, value in vars(config).items() if value is not None}
    return dataclasses.replace(defaults, **given)
