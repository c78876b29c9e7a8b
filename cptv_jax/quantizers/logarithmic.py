"""Logarithmic quantizer for post-softmax attention."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Log2:
    """code = round(-log2 x) for x in (0, 1]; value = 2^-code (FQ-ViT, equation 12).

    high: largest code that stands for a power of two, 2^bits - 1. The code high + 1 stands for zero: the published
        quantizer keeps a mask of the values below 2^-high beside the clamped codes, so it has one level more than
        its bits say, and so has this one.
    """

    high: Float[Array, ""]

    @property
    def scale(self) -> Float[Array, ""]:
        """Fixed at 1: the levels are absolute."""
        return jnp.ones((), jnp.float32)

    def with_scale(self, scale: Float[Array, "..."]) -> "Log2":
        raise TypeError("a log2 quantizer has no scale to search; leave its sites out of the search")

    def codes(self, values: Float[Array, "..."]) -> Float[Array, "..."]:
        return self.clip_exponents(jnp.round(-jnp.log2(values)))

    def clip_exponents(self, exponents: Float[Array, "..."]) -> Float[Array, "..."]:
        """Codes of the values 2^-exponent; everything past `high` becomes the zero code."""
        return jnp.clip(exponents, 0.0, self.high + 1)

    def values(self, codes: Float[Array, "..."]) -> Float[Array, "..."]:
        # ldexp is exact; XLA's exp2 is not, even at integers.
        return jnp.where(codes > self.high, 0.0, jnp.ldexp(1.0, -codes.astype(jnp.int32)))

    def steps(self, values: Float[Array, "..."]) -> Float[Array, "..."]:
        return self.values(self.codes(values))
