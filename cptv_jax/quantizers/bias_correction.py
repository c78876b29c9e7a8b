"""Weight bias correction: give each output channel of a quantized weight its original mean and deviation."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from cptv_jax.quantizers.uniform import Uniform

EPSILON = 1e-8  # added to the quantized deviation, as in the published code


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class BiasCorrected:
    """A uniform weight quantizer followed by an affine map per output channel (Banner et al. 2019, section 3).

    The effective weight is gain * value + shift, so a channel's scale acts only through rounding and clipping:
    its magnitude cancels in the gain.
    """

    base: Uniform

    @property
    def scale(self) -> Float[Array, "..."]:
        return self.base.scale

    def with_scale(self, scale: Float[Array, "..."]) -> "BiasCorrected":
        return BiasCorrected(self.base.with_scale(scale))

    def codes(self, values: Float[Array, "..."]) -> Float[Array, "..."]:
        return self.base.codes(values)

    def values(self, codes: Float[Array, "..."]) -> Float[Array, "..."]:
        return self.base.values(codes)

    def steps(self, values: Float[Array, "..."]) -> Float[Array, "..."]:
        return self.base.steps(values)

    def correction(
        self, weight: Float[Array, "inputs outputs"], steps: Float[Array, "inputs outputs"]
    ) -> tuple[Float[Array, " outputs"], Float[Array, " outputs"]]:
        """Gain and shift that restore each output channel's mean and (unbiased) deviation."""
        quantized = steps * self.scale
        gain = jnp.std(weight, 0, ddof=1) / (jnp.std(quantized, 0, ddof=1) + EPSILON)
        return gain, jnp.mean(weight, 0) - gain * jnp.mean(quantized, 0)
