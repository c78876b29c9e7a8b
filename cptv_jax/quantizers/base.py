"""What every quantizer offers to the interpreters, to searches and to reconstruction."""

from dataclasses import replace
from typing import Any, Protocol, Self, runtime_checkable

import jax.numpy as jnp
from jaxtyping import Array, Float

from cptv_jax.quantizers.free import Free, free_exponents, place_scale
from cptv_jax.quantizers.rounding import true_divide
from cptv_jax.quantizers.straight_through import straight_through


@runtime_checkable
class Quantizer(Protocol):
    """A pure function pair (codes from values, values from codes) and the pytree of its parameters.

    Implementations are frozen dataclasses registered as pytrees, so a quantizer can be vmapped over (a population),
    differentiated, sharded and saved like any array. Codes are integers held in float32, exact below 2^24. A class
    that derives from `ScaledQuantizer` has to write `codes` and `values` alone.
    """

    @property
    def scale(self) -> Float[Array, "..."]:
        """Input units per step.

        A scalar (per tensor), one value for each entry or for each of several equal parts of the last axis (per
        channel, per part), or (heads, 1, 1) for a matmul's operand.
        """

    def with_scale(self, scale: Float[Array, "..."]) -> Self:
        """The same quantizer with another scale of the same shape; zero point and range stay."""

    def codes(self, values: Float[Array, "..."]) -> Float[Array, "..."]:
        """Integer codes of real values."""

    def values(self, codes: Float[Array, "..."]) -> Float[Array, "..."]:
        """Real values that codes stand for."""

    def steps(self, values: Float[Array, "..."]) -> Float[Array, "..."]:
        """Quantized values in units of `scale`: code minus zero point where the quantizer is uniform."""

    def free(self, powers_of_two: bool = False) -> Free:
        """What of it can be moved, as it stands now.

        Args:
            powers_of_two: Its scales are power-of-two multiples of the smallest, and stay such: the smallest is
                `scale`, and the multiples are `exponents`.

        Returns:
            The values in the units that `Free` documents. `with_free` of them gives the same quantizer.
        """

    def with_free(self, free: Free) -> Self:
        """The same quantizer with the given values in place; what is None stays, and `bias` is no business of its."""

    def with_rounding(self, rounding: Float[Array, "inputs outputs"]) -> Self:
        """The same weight quantizer with another learned rounding, in steps; itself where its class has none."""

    def free_units(self) -> Free:
        """How much of each field of `free()` is one step of its grid; a field that is None is measured otherwise."""


class ScaledQuantizer:
    """Defaults for a quantizer class with a field `scale`, of which nothing else can be moved.

    Example:
        ```python
        @jax.tree_util.register_dataclass
        @dataclass(frozen=True)
        class Ternary(ScaledQuantizer):
            scale: jax.Array

            def codes(self, values):
                return jnp.clip(jnp.round(values / self.scale), -1, 1)

            def values(self, codes):
                return codes * self.scale

        register_quantizer("Ternary", Ternary)
        ```
    """

    scale: Float[Array, "..."]

    def with_scale(self, scale: Float[Array, "..."]) -> Self:
        return replace(self, scale=scale)  # type: ignore[type-var]

    def codes(self, values: Float[Array, "..."]) -> Float[Array, "..."]:
        raise NotImplementedError(f"{type(self).__name__} has to define codes()")

    def values(self, codes: Float[Array, "..."]) -> Float[Array, "..."]:
        raise NotImplementedError(f"{type(self).__name__} has to define values()")

    def steps(self, values: Float[Array, "..."]) -> Float[Array, "..."]:
        """Quantized values over the scale; the derivative is that of the values, as if nothing were clipped."""
        return straight_through(true_divide(self.values(self.codes(values)), self.scale), values / self.scale)

    def free(self, powers_of_two: bool = False) -> Free:
        scale = jnp.asarray(self.scale)
        return Free(jnp.min(scale), exponents=free_exponents(scale)) if powers_of_two else Free(scale)

    def with_free(self, free: Free) -> Self:
        return self if free.scale is None else self.with_scale(place_scale(self.scale, free))

    def with_rounding(self, rounding: Float[Array, "inputs outputs"]) -> Self:
        return self

    def free_units(self) -> Free:
        return Free()


class WrappedQuantizer:
    """Defaults for a quantizer class that puts something around another one, its field `base`."""

    base: Any

    @property
    def scale(self) -> Float[Array, "..."]:
        return self.base.scale

    def with_scale(self, scale: Float[Array, "..."]) -> Self:
        return replace(self, base=self.base.with_scale(scale))  # type: ignore[type-var]

    def codes(self, values: Float[Array, "..."]) -> Float[Array, "..."]:
        return self.base.codes(values)

    def values(self, codes: Float[Array, "..."]) -> Float[Array, "..."]:
        return self.base.values(codes)

    def steps(self, values: Float[Array, "..."]) -> Float[Array, "..."]:
        return self.base.steps(values)

    def free(self, powers_of_two: bool = False) -> Free:
        return self.base.free(powers_of_two)

    def with_free(self, free: Free) -> Self:
        return replace(self, base=self.base.with_free(free))  # type: ignore[type-var]

    def with_rounding(self, rounding: Float[Array, "inputs outputs"]) -> Self:
        return replace(self, base=self.base.with_rounding(rounding))  # type: ignore[type-var]

    def free_units(self) -> Free:
        return self.base.free_units()


def unwrap(quantizer: Quantizer) -> Any:
    """The quantizer without what was put around it: bias correction, a low-rank term."""
    return unwrap(quantizer.base) if isinstance(quantizer, WrappedQuantizer) else quantizer
