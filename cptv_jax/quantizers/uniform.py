"""Uniform (affine) quantizer, symmetric or asymmetric, per tensor or per channel."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Self

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from cptv_jax.quantizers.base import ScaledQuantizer, WrappedQuantizer
from cptv_jax.quantizers.free import Free, place_zero_point
from cptv_jax.quantizers.rounding import rounded_product, true_divide
from cptv_jax.quantizers.straight_through import clip_through, straight_through

_ROUNDING_UNIT = 2.0  # steps that one unit of Free.rounding is


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Uniform(ScaledQuantizer):
    """code = clamp(round(x / scale + zero_point + rounding), low, high); value = (code - zero_point) * scale.

    scale: input units per step; () per tensor, (channels,) or (parts,) along the last axis, or (heads, 1, 1).
    zero_point: broadcasts with scale; the code of the value 0, an integer.
    low, high: bounds of the codes. They are arrays, not static, so that sites of different bit widths share one
        compiled program.
    rounding: of a weight, what is added to each of its elements before rounding, in steps, of the weight's shape: which
        way it rounds can be learned so (AdaRound, Nagel et al. 2020). None adds nothing.

    Rounding is half to even, after the zero point is added (FQ-ViT, section 3.1). The derivative of a code is
    straight-through, 1 within the bounds and 0 outside, which gives values LSQ's by the scale (Esser et al. 2020,
    equation 3).
    """

    scale: Float[Array, "..."]
    zero_point: Float[Array, "..."]
    low: Float[Array, ""]
    high: Float[Array, ""]
    rounding: Float[Array, "inputs outputs"] | None = None

    def free(self, powers_of_two: bool = False) -> Free:
        """The scale, the zero point, and the rounding where there is a learned one."""
        rounding = None if self.rounding is None else true_divide(self.rounding, _ROUNDING_UNIT)
        zero_point = self.zero_point / (self.high - self.low)
        return replace(super().free(powers_of_two), rounding=rounding, zero_point=zero_point)

    def with_free(self, free: Free) -> Self:
        moved = super().with_free(free)
        if free.zero_point is not None:
            zero_point = place_zero_point(free.zero_point, self.zero_point, self.low, self.high)
            moved = replace(moved, zero_point=zero_point)
        if free.rounding is not None:
            moved = moved.with_rounding(rounded_product(free.rounding, _ROUNDING_UNIT))
        return moved

    def with_rounding(self, rounding: Float[Array, "inputs outputs"]) -> Self:
        return replace(self, rounding=rounding)

    def free_units(self) -> Free:
        return Free(rounding=1 / _ROUNDING_UNIT, zero_point=1 / (self.high - self.low))

    def codes(self, values: Float[Array, "..."]) -> Float[Array, "..."]:
        scale, zero_point = spread(self.scale, values), spread(self.zero_point, values)
        exact = jnp.clip(jnp.round(self._nudge(true_divide(values, scale) + zero_point)), self.low, self.high)
        # Clipped before rounding in the derivative: after it, whatever rounds to a bound would lie on the clip's kink.
        return straight_through(exact, clip_through(self._nudge(values / scale + zero_point), self.low, self.high))

    def _nudge(self, steps: Float[Array, "..."]) -> Float[Array, "..."]:
        return steps if self.rounding is None else steps + self.rounding

    def values(self, codes: Float[Array, "..."]) -> Float[Array, "..."]:
        return (codes - spread(self.zero_point, codes)) * spread(self.scale, codes)

    def steps(self, values: Float[Array, "..."]) -> Float[Array, "..."]:
        return self.codes(values) - spread(self.zero_point, values)

    def clip(self, steps: Float[Array, "..."]) -> Float[Array, "..."]:
        """Codes of steps that are on this grid already (an integer LayerNorm emits such)."""
        return jnp.clip(steps + self.zero_point, self.low, self.high)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class OffsetUniform(Uniform):
    """code = clamp(round(x / scale) + zero_point, low, high): rounds before the zero point is added.

    RepQ-ViT and ERQ round so (RepQ-ViT, "Preliminaries"): ties go to even steps, not to even codes.
    """

    def codes(self, values: Float[Array, "..."], rounding: Callable[[Array], Array] = jnp.round) -> Float[Array, "..."]:
        """Codes of real values; rounding may be jnp.floor or jnp.ceil, for the grid's neighbours of a value."""
        exact = jnp.clip(rounding(self._nudge(true_divide(values, self.scale))) + self.zero_point, self.low, self.high)
        smooth = self._nudge(values / self.scale) + self.zero_point
        return straight_through(exact, clip_through(smooth, self.low, self.high))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class FractionalUniform(WrappedQuantizer):
    """An OffsetUniform whose zero point is no integer, as RepQ-ViT's reparameterization leaves it.

    Then codes are no integers either, and are not stored as such. Steps inside the range are integers all the same, but
    where a value is clipped the step is low - zero_point or high - zero_point.
    """

    base: OffsetUniform

    @property
    def zero_point(self) -> Float[Array, "..."]:
        return self.base.zero_point

    def round_zero_point(self) -> OffsetUniform:
        """The quantizer with its zero point rounded to a code."""
        grid = self.base
        return replace(grid, zero_point=jnp.clip(jnp.round(grid.zero_point), grid.low, grid.high))

    def free(self, powers_of_two: bool = False) -> Free:
        """The scale alone: a zero point that is no code stays as it is."""
        found = self.base.free(powers_of_two)
        return found.only("scale", "exponents")

    def with_rounding(self, rounding: Float[Array, "inputs outputs"]) -> Self:
        return self


def spread(parameter: Float[Array, "..."], values: Float[Array, "..."]) -> Float[Array, "..."]:
    """A parameter that is held once for each of several equal parts of the last axis, for every entry of that axis.

    A parameter of any other shape already broadcasts against `values` and is returned as it is.
    """
    if parameter.ndim != 1 or parameter.shape[0] in (1, values.shape[-1]):
        return parameter
    return jnp.repeat(parameter, values.shape[-1] // parameter.shape[0])


def grid(bits: int, signed: bool) -> tuple[float, float]:
    """Bounds of an integer grid: (0, 2^bits - 1), or (-2^(bits-1), 2^(bits-1) - 1) when signed.

    bits may be a traced integer; the bounds then are float32 scalars, exact as well.
    """
    levels = 1 << bits  # shifted, not raised to a power: XLA's pow rounds
    return (-levels / 2, levels / 2 - 1) if signed else (0.0, levels - 1.0)
