"""Weight bias correction: gives each output channel of a quantized weight its original mean and deviation."""

from dataclasses import dataclass, field, replace
from typing import NamedTuple, Self

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from cptv_jax.quantizers.base import WrappedQuantizer
from cptv_jax.quantizers.free import Free
from cptv_jax.quantizers.rounding import rounded_product, true_divide
from cptv_jax.quantizers.uniform import Uniform

EPSILON = 1e-8  # added to the quantized deviation, as in the published code
_EXACT_ROWS = 256  # a sum of this many squares of 8-bit steps is exact in float32


class Moments(NamedTuple):
    """Mean and unbiased deviation of each output channel of a weight.

    Attributes:
        mean: Mean over the inputs, in input units or in steps.
        deviation: Standard deviation over the inputs, in the same unit.
    """

    mean: Float[Array, " outputs"]
    deviation: Float[Array, " outputs"]


def moments(weight: Float[Array, "inputs outputs"]) -> Moments:
    """Computes the moments that bias correction restores.

    The last digit of the sums depends on the program that they are compiled in.

    Args:
        weight: The float weight.

    Returns:
        The moments of each output channel.
    """
    return Moments(jnp.mean(weight, 0), jnp.std(weight, 0, ddof=1))


def _sum(integers: Float[Array, "inputs outputs"]) -> Float[Array, " outputs"]:
    """Returns sums over the inputs, exact in parts that are added in order: the same however they are compiled."""
    parts = [jnp.sum(integers[i : i + _EXACT_ROWS], 0) for i in range(0, integers.shape[0], _EXACT_ROWS)]
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


def _moments_of_steps(steps: Float[Array, "inputs outputs"]) -> Moments:
    """Returns `moments` of integers, from exact sums around the integer nearest to the mean."""
    count = steps.shape[0]
    mean = true_divide(_sum(steps), count)
    centre = jnp.round(mean)
    excess = rounded_product(count, rounded_product(mean - centre, mean - centre))
    variance = true_divide(_sum((steps - centre) ** 2) - excess, count - 1)
    return Moments(mean, jnp.sqrt(jnp.maximum(variance, 0.0)))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class BiasCorrected(WrappedQuantizer):
    """A uniform weight quantizer followed by an affine map per output channel (Banner et al. 2019, section 3).

    The effective weight is gain * value + shift, so a channel's scale acts only through rounding and clipping: its
    magnitude cancels in the gain.

    Attributes:
        base: The weight's quantizer.
        factor: Multiplies the corrected weight, () or [outputs]; 1 as published. It lets a search change a channel's
            magnitude.
    """

    base: Uniform
    factor: Float[Array, "..."] = field(default_factory=lambda: jnp.ones(()))

    def free(self, powers_of_two: bool = False) -> Free:
        """Returns the free values of the base, and the factor where every channel has its own."""
        found = self.base.free(powers_of_two)
        return replace(found, factor=self.factor) if self.factor.shape == self.scale.shape else found

    def with_free(self, free: Free) -> Self:
        """Returns the quantizer with moved values in the base, and the moved factor."""
        moved = super().with_free(free)
        return moved if free.factor is None else replace(moved, factor=free.factor)

    def correction(
        self, wanted: Moments, steps: Float[Array, "inputs outputs"]
    ) -> tuple[Float[Array, " outputs"], Float[Array, " outputs"]]:
        """Computes the map that gives each output channel `factor` times the wanted mean and (unbiased) deviation.

        The result does not depend on the program that it is compiled in, so a candidate has the same weights wherever
        it is evaluated.

        Args:
            wanted: The float weight's moments.
            steps: The quantized weight, in steps.

        Returns:
            Gain and shift of each output channel.
        """
        found = _moments_of_steps(steps)
        gain = true_divide(wanted.deviation, rounded_product(found.deviation, self.scale) + EPSILON)
        shift = wanted.mean - rounded_product(gain, rounded_product(found.mean, self.scale))
        return rounded_product(gain, self.factor), rounded_product(shift, self.factor)
