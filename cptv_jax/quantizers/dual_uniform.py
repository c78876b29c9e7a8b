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

    scale, zero_point: [outputs], of the ordinary inputs. outlier_ratio: [outputs], the outliers' scale in units of
    `scale`; outlier_zero_point: [outputs]. is_outlier: [inputs].
    low, high: bounds of the codes of both grids.

    Each grid is an OffsetUniform. The outliers' scale is held as a ratio so that a search over `scale` moves both
    grids of a channel by one factor, and the same scale always means the same quantizer. Steps of outliers are
    multiples of outlier_ratio, not integers.
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
        return self.scale * self.outlier_ratio

    def free(self, powers_of_two: bool = False) -> Free:
        """The scale, and the zero point of the ordinary inputs."""
        return replace(super().free(powers_of_two), zero_point=self.zero_point / (self.high - self.low))

    def with_free(self, free: Free) -> Self:
        moved = super().with_free(free)
        if free.zero_point is None:
            return moved
        return replace(moved, zero_point=place_zero_point(free.zero_point, self.zero_point, self.low, self.high))

    def free_units(self) -> Free:
        return Free(zero_point=1 / (self.high - self.low))

    def _choose(
        self, outlier: Float[Array, " outputs"], ordinary: Float[Array, " outputs"]
    ) -> Float[Array, "inputs outputs"]:
        return jnp.where(self.is_outlier[:, None], outlier, ordinary)

    def codes(
        self, values: Float[Array, "inputs outputs"], rounding: Callable[[Array], Array] = jnp.round
    ) -> Float[Array, "inputs outputs"]:
        """Codes of real values; rounding may be jnp.floor or jnp.ceil, for the grid's neighbours of a value."""
        positions = true_divide(values, self._choose(self.outlier_scale, self.scale))
        zero_point = self._choose(self.outlier_zero_point, self.zero_point)
        exact = jnp.clip(rounding(positions) + zero_point, self.low, self.high)
        return straight_through(exact, clip_through(positions + zero_point, self.low, self.high))

    def values(self, codes: Float[Array, "inputs outputs"]) -> Float[Array, "inputs outputs"]:
        return self._integer_steps(codes) * self._choose(self.outlier_scale, self.scale)

    def steps(self, values: Float[Array, "inputs outputs"]) -> Float[Array, "inputs outputs"]:
        return self._integer_steps(self.codes(values)) * self._choose(self.outlier_ratio, jnp.ones_like(self.scale))

    def _integer_steps(self, codes: Float[Array, "inputs outputs"]) -> Float[Array, "inputs outputs"]:
        return codes - self._choose(self.outlier_zero_point, self.zero_point)
