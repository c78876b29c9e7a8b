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

_ROUNDING_UNIT = 2.0  # steps in one unit of Free.rounding


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Uniform(ScaledQuantizer):
    """code = clamp(round(x / scale + zero_point + rounding), low, high); value = (code - zero_point) * scale.

    Rounding is half to even, after the zero point is added (FQ-ViT, section 3.1). The derivative of a code is
    straight-through, 1 within the bounds and 0 outside, which gives values LSQ's derivative with respect to the scale
    (Esser et al. 2020, equation 3).

    Attributes:
        scale: Input units per step; () per tensor, (channels,) or (parts,) along the last axis, or (heads, 1, 1).
        zero_point: The code of the value 0, an integer; broadcasts with scale.
        low: The smallest code. The bounds are arrays, not static, so that sites of different bit widths share one
            compiled program.
        high: The largest code.
        rounding: What is added to each element of a weight before rounding, in steps, of the weight's shape, so that it
            can be learned which way the element rounds (AdaRound, Nagel et al. 2020). None adds nothing.
    """

    scale: Float[Array, "..."]
    zero_point: Float[Array, "..."]
    low: Float[Array, ""]
    high: Float[Array, ""]
    rounding: Float[Array, "inputs outputs"] | None = None

    def free(self, powers_of_two: bool = False) -> Free:
        """Returns the scale, the zero point, and the rounding where there is a learned one."""
        rounding = None if self.rounding is None else true_divide(self.rounding, _ROUNDING_UNIT)
        zero_point = self.zero_point / (self.high - self.low)
        return replace(super().free(powers_of_two), rounding=rounding, zero_point=zero_point)

    def with_free(self, free: Free) -> Self:
        """Returns the quantizer with a moved scale, zero point and rounding."""
        moved = super().with_free(free)
        if free.zero_point is not None:
            zero_point = place_zero_point(free.zero_point, self.zero_point, self.low, self.high)
            moved = replace(moved, zero_point=zero_point)
        if free.rounding is not None:
            moved = moved.with_rounding(rounded_product(free.rounding, _ROUNDING_UNIT))
        return moved

    def with_rounding(self, rounding: Float[Array, "inputs outputs"]) -> Self:
        """Returns the quantizer with another learned rounding, in steps."""
        return replace(self, rounding=rounding)

    def free_units(self) -> Free:
        """Returns the units of the rounding and the zero point: one step, and one code."""
        return Free(rounding=1 / _ROUNDING_UNIT, zero_point=1 / (self.high - self.low))

    def codes(self, values: Float[Array, "..."]) -> Float[Array, "..."]:
        """Returns codes of real values."""
        scale, zero_point = spread(self.scale, values), spread(self.zero_point, values)
        exact = jnp.clip(jnp.round(self._nudge(true_divide(values, scale) + zero_point)), self.low, self.high)
        # The derivative clips before rounding: after it, all that rounds to a bound would lie on the clip's kink.
        return straight_through(exact, clip_through(self._nudge(values / scale + zero_point), self.low, self.high))

    def _nudge(self, steps: Float[Array, "..."]) -> Float[Array, "..."]:
        return steps if self.rounding is None else steps + self.rounding

    def values(self, codes: Float[Array, "..."]) -> Float[Array, "..."]:
        """Returns the real values that codes stand for."""
        return (codes - spread(self.zero_point, codes)) * spread(self.scale, codes)

    def steps(self, values: Float[Array, "..."]) -> Float[Array, "..."]:
        """Returns quantized values in units of `scale`: codes minus zero point."""
        return self.codes(values) - spread(self.zero_point, values)

    def clip(self, steps: Float[Array, "..."]) -> Float[Array, "..."]:
        """Returns codes of steps that are on this grid already (an integer LayerNorm emits such steps)."""
        return jnp.clip(steps + self.zero_point, self.low, self.high)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class OffsetUniform(Uniform):
    """code = clamp(round(x / scale) + zero_point, low, high): rounds before the zero point is added.

    RepQ-ViT and ERQ round this way (RepQ-ViT, "Preliminaries"): ties go to even steps, not to even codes. The fields
    are those of `Uniform`.
    """

    def codes(self, values: Float[Array, "..."], rounding: Callable[[Array], Array] = jnp.round) -> Float[Array, "..."]:
        """Returns codes of real values; `rounding` may be jnp.floor or jnp.ceil, for neighbours on the grid."""
        exact = jnp.clip(rounding(self._nudge(true_divide(values, self.scale))) + self.zero_point, self.low, self.high)
        smooth = self._nudge(values / self.scale) + self.zero_point
        return straight_through(exact, clip_through(smooth, self.low, self.high))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class FractionalUniform(WrappedQuantizer):
    """An OffsetUniform whose zero point is not an integer, as RepQ-ViT's reparameterization leaves it.

    Codes are then not integers either, and are not stored as such. Steps inside the range are integers all the same,
    but where a value is clipped the step is low - zero_point or high - zero_point.

    Attributes:
        base: The quantizer with the fractional zero point.
    """

    base: OffsetUniform

    @property
    def zero_point(self) -> Float[Array, "..."]:
        """The fractional zero point."""
        return self.base.zero_point

    def round_zero_point(self) -> OffsetUniform:
        """Returns the quantizer with its zero point rounded to a code."""
        grid = self.base
        return replace(grid, zero_point=jnp.clip(jnp.round(grid.zero_point), grid.low, grid.high))

    def free(self, powers_of_two: bool = False) -> Free:
        """Returns the scale alone: a zero point that is not a code stays as it is."""
        found = self.base.free(powers_of_two)
        return found.only("scale", "exponents")

    def with_rounding(self, rounding: Float[Array, "inputs outputs"]) -> Self:
        """Returns the quantizer itself: it has no learned rounding."""
        return self


def spread(parameter: Float[Array, "..."], values: Float[Array, "..."]) -> Float[Array, "..."]:
    """Repeats a parameter, held once for each of several equal parts of the last axis, for every entry of that axis.

    Args:
        parameter: The parameter. One of any other shape already broadcasts against `values`.
        values: The tensor that it belongs to.

    Returns:
        A parameter that broadcasts against `values`.
    """
    if parameter.ndim != 1 or parameter.shape[0] in (1, values.shape[-1]):
        return parameter
    return jnp.repeat(parameter, values.shape[-1] // parameter.shape[0])


def grid(bits: int, signed: bool) -> tuple[float, float]:
    """Returns the bounds of an integer grid: (0, 2^bits - 1), or (-2^(bits-1), 2^(bits-1) - 1) when signed.

    Args:
        bits: Width of the codes. It may be a traced integer; the bounds are then float32 scalars, exact as well.
        signed: Whether codes may be negative.
    """
    levels = 1 << bits  # a shift, because XLA's pow rounds
    return (-levels / 2, levels / 2 - 1) if signed else (0.0, levels - 1.0)
