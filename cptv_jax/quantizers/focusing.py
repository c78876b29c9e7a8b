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

    Derivatives are straight-through, also with respect to the interval's ends: within it, a value's derivative with
    respect to the scale is that of its rounding error; outside it, that of the end that it is clamped to.

    Attributes:
        scale: Input units per step, one for all or [heads, 1, 1].
        start: Lower end of the interval, in input units and of the same shape; it need not be a multiple of the scale,
            and zero need not be a level.
        high: The largest code; the upper end is start + high * scale.
    """

    scale: Float[Array, "..."]
    start: Float[Array, "..."]
    high: Float[Array, ""]

    @property
    def end(self) -> Float[Array, "..."]:
        """Upper end of the interval, in input units."""
        return self.start + self.high * self.scale

    def free(self, powers_of_two: bool = False) -> Free:
        """Returns the scale and the start, as a fraction of the interval's length."""
        return replace(super().free(powers_of_two), start=self.start / (self.high * self.scale))

    def with_free(self, free: Free) -> Self:
        """Returns the moved quantizer: a given start counts from the new scale; without one the lower end stays."""
        moved = super().with_free(free)
        return moved if free.start is None else replace(moved, start=free.start * (moved.high * moved.scale))

    def free_units(self) -> Free:
        """Returns the unit of the start: one step."""
        return Free(start=1 / self.high)

    def codes(self, values: Float[Array, "..."]) -> Float[Array, "..."]:
        """Returns codes of real values, from 0 to `high`."""
        positions = true_divide(values - self.start, self.scale)
        exact = jnp.clip(jnp.round(positions), 0.0, self.high)
        return straight_through(exact, clip_through(positions, 0.0, self.high))

    def values(self, codes: Float[Array, "..."]) -> Float[Array, "..."]:
        """Returns the real values that codes stand for."""
        return codes * self.scale + self.start

    def steps(self, values: Float[Array, "..."]) -> Float[Array, "..."]:
        """Returns quantized values in units of `scale`: integers plus start / scale."""
        return self.codes(values) + true_divide(self.start, self.scale)
