"""Logarithmic quantizers for post-softmax attention."""

from dataclasses import dataclass
from typing import Self

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from cptv_jax.quantizers.base import ScaledQuantizer
from cptv_jax.quantizers.free import Free
from cptv_jax.quantizers.rounding import true_divide
from cptv_jax.quantizers.straight_through import clip_through, straight_through

_SQRT2_LESS_1 = 2.0**0.5 - 1.0


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Log2:
    """code = round(-log2 x) for x in (0, 1]; value = 2^-code (FQ-ViT, equation 12).

    Attributes:
        high: The largest code that stands for a power of two, 2^bits - 1. The code high + 1 stands for zero: in
            addition to the clamped codes, the published quantizer keeps a mask of the values below 2^-high, so it has
            one level more than its bits say, and so has this one.
    """

    high: Float[Array, ""]

    @property
    def scale(self) -> Float[Array, ""]:
        """Fixed at 1: the levels are absolute."""
        return jnp.ones((), jnp.float32)

    def with_scale(self, scale: Float[Array, "..."]) -> Self:
        """Refuses any scale: the levels are absolute.

        Args:
            scale: Any scale.

        Raises:
            TypeError: Always.
        """
        raise TypeError("a log2 quantizer has no scale to search; leave its sites out of the search")

    def free(self, powers_of_two: bool = False) -> Free:
        """Returns no values: nothing of it can be moved."""
        return Free()

    def with_free(self, free: Free) -> Self:
        """Returns the quantizer itself.

        Args:
            free: Values without a scale.

        Raises:
            TypeError: A scale is given.
        """
        return self if free.scale is None else self.with_scale(free.scale)

    def with_rounding(self, rounding: Float[Array, "inputs outputs"]) -> Self:
        """Returns the quantizer itself: it has no learned rounding."""
        return self

    def free_units(self) -> Free:
        """Returns no units: nothing of it can be moved."""
        return Free()

    def codes(self, values: Float[Array, "..."]) -> Float[Array, "..."]:
        """Returns codes of values from 0 to 1."""
        return self.clip_exponents(jnp.round(-jnp.log2(values)))

    def clip_exponents(self, exponents: Float[Array, "..."]) -> Float[Array, "..."]:
        """Returns codes of the values 2^-exponent; every exponent past `high` becomes the zero code."""
        return jnp.clip(exponents, 0.0, self.high + 1)

    def values(self, codes: Float[Array, "..."]) -> Float[Array, "..."]:
        """Returns the values that codes stand for: powers of two, or zero."""
        # ldexp is exact; XLA's exp2 is not, even at integers.
        return jnp.where(codes > self.high, 0.0, jnp.ldexp(1.0, -codes.astype(jnp.int32)))

    def steps(self, values: Float[Array, "..."]) -> Float[Array, "..."]:
        """Returns quantized values; the scale is 1."""
        return straight_through(self.values(self.codes(values)), values)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LogSqrt2(ScaledQuantizer):
    """code = round(-2 log2(x / scale)) for x > 0; value = scale * sqrt(2)^-code.

    RepQ-ViT, "Scale Reparam for Softmax Activations".

    Attributes:
        scale: The value of code 0; larger values are clipped to it.
        high: The largest code that stands for a power, 2^bits - 1. The code high + 1 stands for zero, as in Log2.
    """

    scale: Float[Array, ""]
    high: Float[Array, ""]

    def codes(self, values: Float[Array, "..."]) -> Float[Array, "..."]:
        """Returns codes of values that are not negative."""
        return jnp.clip(jnp.round(-2.0 * jnp.log2(true_divide(values, self.scale))), 0.0, self.high + 1)

    def log2_form(self, codes: Float[Array, "..."]) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
        """Splits codes into exponents e and factors f with value = scale * f * 2^-e.

        This is the form for inference: a bit shift by e = ceil(code / 2), and one of two scales by the code's parity,
        scale for even and sqrt(2) scale for odd codes.

        Args:
            codes: The codes.

        Returns:
            Exponents and factors.
        """
        return jnp.ceil(codes / 2), 1.0 + (codes % 2) * _SQRT2_LESS_1

    def values(self, codes: Float[Array, "..."]) -> Float[Array, "..."]:
        """Returns the values that codes stand for: powers of sqrt(2) times the scale, or zero."""
        return self._in_steps(codes) * self.scale

    def steps(self, values: Float[Array, "..."]) -> Float[Array, "..."]:
        """Returns quantized values in units of `scale`: powers of sqrt(2), not integers."""
        exact = self._in_steps(self.codes(values))
        return straight_through(exact, clip_through(values / self.scale, 0.0, 1.0))

    def _in_steps(self, codes: Float[Array, "..."]) -> Float[Array, "..."]:
        exponents, factors = self.log2_form(codes)
        powers = jnp.ldexp(jnp.float32(1.0), -exponents.astype(jnp.int32))  # exact; XLA's exp2 is not
        return jnp.where(codes > self.high, 0.0, powers * factors)
