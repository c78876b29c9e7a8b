"""Two uniform grids in one weight: one for the inputs with many outliers, one for all others."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Self

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from cptv_jax.quantizers.base import ScaledQuantizer
from cptv_jax.quantizers.free import Free, place_zero_point
from cptv_jax.quantizers.rounding import true_divide
from cptv_jax.quantizers.straight_through import clip_through, straight_through


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DualUniform(ScaledQuantizer):
    """A weight [inputs, outputs] with two asymmetric grids per output channel (ERQ's dual uniform quantization).

    Each grid is an OffsetUniform. The outliers' scale is held as a ratio so that a search over `scale` moves both grids
    of a channel by one factor, and the same scale always means the same quantizer. Steps of outliers are multiples of
    outlier_ratio, not integers.

    Attributes:
        scale: Input units per step of the ordinary inputs.
        zero_point: Code of the value 0 at the ordinary inputs.
        outlier_ratio: The outliers' scale in units of `scale`.
        outlier_zero_point: Code of the value 0 at the outliers.
        is_outlier: Which inputs have the outliers' grid.
        low: The smallest code of both grids.
        high: The largest code of both grids.
    """

    scale: Float[Array, " outputs"]
    zero_point: Float[Array, " outputs"]
    outlier_ratio: Float[Array, " outputs"]
    outlier_zero_point: Float[Array, " outputs"]
    is_outlier: Bool[Array, " inputs"]
    low: Float[Array, ""]
    high: Float[Array, ""]

    @property
    def outlier_scale(self) -> Float[Array, " outputs"]:
        """Input units per step of the outliers."""
        return self.scale * self.outlier_ratio

    def free(self, powers_of_two: bool = False) -> Free:
        """Returns the scale, and the zero point of the ordinary inputs."""
        return replace(super().free(powers_of_two), zero_point=self.zero_point / (self.high - self.low))

    def with_free(self, free: Free) -> Self:
        """Returns the quantizer with a moved scale, and the moved zero point of the ordinary inputs."""
        moved = super().with_free(free)
        if free.zero_point is None:
            return moved
        return replace(moved, zero_point=place_zero_point(free.zero_point, self.zero_point, self.low, self.high))

    def free_units(self) -> Free:
        """Returns the unit of the zero point: one code."""
        return Free(zero_point=1 / (self.high - self.low))

    def _choose(
        self, outlier: Float[Array, " outputs"], ordinary: Float[Array, " outputs"]
    ) -> Float[Array, "inputs outputs"]:
        return jnp.where(self.is_outlier[:, None], outlier, ordinary)

    def codes(
        self, values: Float[Array, "inputs outputs"], rounding: Callable[[Array], Array] = jnp.round
    ) -> Float[Array, "inputs outputs"]:
        """Returns codes of real values; `rounding` may be jnp.floor or jnp.ceil, for neighbours on the grid."""
        positions = true_divide(values, self._choose(self.outlier_scale, self.scale))
        zero_point = self._choose(self.outlier_zero_point, self.zero_point)
        exact = jnp.clip(rounding(positions) + zero_point, self.low, self.high)
        return straight_through(exact, clip_through(positions + zero_point, self.low, self.high))

    def values(self, codes: Float[Array, "inputs outputs"]) -> Float[Array, "inputs outputs"]:
        """Returns the real values that codes stand for."""
        return self._integer_steps(codes) * self._choose(self.outlier_scale, self.scale)

    def steps(self, values: Float[Array, "inputs outputs"]) -> Float[Array, "inputs outputs"]:
        """Returns quantized values over `scale`: integers, or at outliers multiples of outlier_ratio."""
        return self._integer_steps(self.codes(values)) * self._choose(self.outlier_ratio, jnp.ones_like(self.scale))

    def _integer_steps(self, codes: Float[Array, "inputs outputs"]) -> Float[Array, "inputs outputs"]:
        return codes - self._choose(self.outlier_zero_point, self.zero_point)
