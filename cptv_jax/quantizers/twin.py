"""Twin uniform quantizers (PTQ4ViT, section 4.1): a fine and a coarse uniform range that share one code."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from cptv_jax.quantizers.base import ScaledQuantizer
from cptv_jax.quantizers.rounding import true_divide
from cptv_jax.quantizers.straight_through import clip_through, straight_through


def _round_and_clip(positions: Array, low: Array | float, high: Array | float) -> Array:
    """Returns positions rounded and clipped, with straight-through derivatives as in Uniform."""
    return straight_through(jnp.clip(jnp.round(positions), low, high), clip_through(positions, low, high))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TwinSoftmax(ScaledQuantizer):
    """For post-softmax values in [0, 1]: a fine range [0, split] and a coarse one up to 1 (equation 7).

    Codes 0 to `levels` are fine levels, code * scale; codes above are coarse, (code - levels - 1) * ratio * scale. The
    fine range ends at split = levels * scale. Above it a value takes the nearest coarse level, or the split where that
    is larger (the published formula would round such a value to a smaller one, even to zero).

    Attributes:
        scale: The fine step, (); when it changes, the coarse step and the split change by the same factor.
        ratio: Coarse step over fine step, a power of two, so that steps are integers.
        levels: 2^(bits - 1) - 1.
        overlap: 0, or 1 for the formula of the published code, which adds both ranges' results instead of choosing one:
            split more above the split, round(split / coarse step) coarse steps more below it.
    """

    scale: Float[Array, ""]
    ratio: Float[Array, ""]
    levels: Float[Array, ""]
    overlap: Float[Array, ""]

    def codes(self, values: Float[Array, "..."]) -> Float[Array, "..."]:
        """Returns codes of values from 0 to 1."""
        fine = _round_and_clip(true_divide(values, self.scale), 0.0, self.levels)
        coarse = _round_and_clip(true_divide(values, self.scale * self.ratio), 0.0, self.levels)
        above = (values > self.levels * self.scale) & (coarse * self.ratio >= self.levels * (1.0 - self.overlap))
        return jnp.where(above, coarse + self.levels + 1.0, fine)

    def values(self, codes: Float[Array, "..."]) -> Float[Array, "..."]:
        """Returns the real values that codes stand for."""
        return self._steps_of(codes) * self.scale

    def steps(self, values: Float[Array, "..."]) -> Float[Array, "..."]:
        """Returns quantized values in units of the fine step: integers up to levels * ratio."""
        return self._steps_of(self.codes(values))

    def _steps_of(self, codes: Float[Array, "..."]) -> Float[Array, "..."]:
        coarse_at_split = jnp.round(true_divide(self.levels, self.ratio)) * self.ratio
        fine = codes + self.overlap * coarse_at_split
        coarse = (codes - self.levels - 1.0) * self.ratio + self.overlap * self.levels
        return jnp.where(codes > self.levels, coarse, fine)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TwinGelu(ScaledQuantizer):
    """For post-GELU values: one step size above zero and another, finer one below (equation 7).

    code = clamp(round(x / step), low, high) with the step of x's sign, so negative codes are negative values.

    Attributes:
        scale: The step above zero, ().
        negative_scale: The step below zero, (); it covers GELU's fixed negative range and stays when `scale` changes.
        low: The smallest code.
        high: The largest code.
    """

    scale: Float[Array, ""]
    negative_scale: Float[Array, ""]
    low: Float[Array, ""]
    high: Float[Array, ""]

    def codes(self, values: Float[Array, "..."]) -> Float[Array, "..."]:
        """Returns codes of real values."""
        step = jnp.where(values < 0, self.negative_scale, self.scale)
        return _round_and_clip(values / step, self.low, self.high)

    def values(self, codes: Float[Array, "..."]) -> Float[Array, "..."]:
        """Returns the real values that codes stand for."""
        return codes * jnp.where(codes < 0, self.negative_scale, self.scale)

    def steps(self, values: Float[Array, "..."]) -> Float[Array, "..."]:
        """Returns quantized values in units of `scale`: integers above zero, not below."""
        codes = self.codes(values)
        return jnp.where(codes < 0, codes * (self.negative_scale / self.scale), codes)


def twin_softmax(bits: int, split: Float[Array, ""], overlap: bool = False) -> TwinSoftmax:
    """Makes the quantizer with a given split, whose coarse range ends at 1.

    Args:
        bits: Width of the codes.
        split: Where the fine range ends, a power of two up to 1.
        overlap: See `TwinSoftmax`.

    Returns:
        The quantizer.
    """
    levels = jnp.float32(2 ** (bits - 1) - 1)
    return TwinSoftmax(true_divide(split, levels), 1.0 / split, levels, jnp.float32(overlap))
