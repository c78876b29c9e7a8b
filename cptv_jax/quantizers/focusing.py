"""Quantizer with all its levels in one interval, wherever that lies."""

from dataclasses import dataclass, replace
from typing import Self

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from cptv_jax.quantizers.base import ScaledQuantizer
from cptv_jax.quantizers.free import Free
from cptv_jax.quantizers.rounding import true_divide
from cptv_jax.quantizers.straight_through import clip_through, straight_through


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Focusing(ScaledQuantizer):
    """code = round((clamp(x, start, end) - start) / scale); value = start + code * scale (AIQViT's dynamic focusing).

    scale: input units per step, one for all or [heads, 1, 1]. start: lower end of the interval, in input units and of
    the same shape; it need not be a multiple of the scale, and zero need not be a level. high: largest code; the upper
    end is start + high * scale.

    Derivatives are straight-through, by the interval's ends too: within it a value's derivative by the scale is that of
    its rounding error, outside it is that of the end it is clamped to.
    """

    scale: Float[Array, "..."]
    start: Float[Array, "..."]
    high: Float[Array, ""]

    @property
    def end(self) -> Float[Array, "..."]:
        return self.start + self.high * self.scale

    def free(self, powers_of_two: bool = False) -> Free:
        return replace(super().free(powers_of_two), start=self.start / (self.high * self.scale))

    def with_free(self, free: Free) -> Self:
        """A given start counts from the new scale; without one the lower end stays where it is."""
        moved = super().with_free(free)
        return moved if free.start is None else replace(moved, start=free.start * (moved.high * moved.scale))

    def free_units(self) -> Free:
        return Free(start=1 / self.high)

    def codes(self, values: Float[Array, "..."]) -> Float[Array, "..."]:
        positions = true_divide(values - self.start, self.scale)
        exact = jnp.clip(jnp.round(positions), 0.0, self.high)
        return straight_through(exact, clip_through(positions, 0.0, self.high))

    def values(self, codes: Float[Array, "..."]) -> Float[Array, "..."]:
        return codes * self.scale + self.start

    def steps(self, values: Float[Array, "..."]) -> Float[Array, "..."]:
        """Quantized values in units of `scale`: integers plus start / scale."""
        return self.codes(values) + true_divide(self.start, self.scale)
