"""The interface that every quantizer offers to interpreters, to searches and to reconstruction."""

from dataclasses import replace
from typing import Any, Protocol, Self, runtime_checkable

import jax.numpy as jnp
from jaxtyping import Array, Float

from cptv_jax.quantizers.free import Free, free_exponents, place_scale
from cptv_jax.quantizers.rounding import true_divide
from cptv_jax.quantizers.straight_through import straight_through


@runtime_checkable
class Quantizer(Protocol):
    """A pair of pure functions (codes from values, values from codes) and the pytree of its parameters.

    Implementations are frozen dataclasses registered as pytrees, so a quantizer can be vmapped over (a population),
    differentiated, sharded and saved like any array. Codes are integers held in float32, exact below 2^24. A class that
    derives from `ScaledQuantizer` only has to write `codes` and `values`.
    """

    @property
    def scale(self) -> Float[Array, "..."]:
        """Input units per step.

        A scalar (per tensor), one value for each entry or for each of several equal parts of the last axis (per
        channel, per part), or (heads, 1, 1) for a matmul's operand.
        """

    def with_scale(self, scale: Float[Array, "..."]) -> Self:
        """Replaces the scale; zero point and range stay.

        Args:
            scale: The new scale, of the same shape.

        Returns:
            The quantizer with that scale.
        """

    def codes(self, values: Float[Array, "..."]) -> Float[Array, "..."]:
        """Converts real values to codes.

        Args:
            values: Real values, in input units.

        Returns:
            Integer codes, held in float32.
        """

    def values(self, codes: Float[Array, "..."]) -> Float[Array, "..."]:
        """Converts codes to the real values that they stand for.

        Args:
            codes: Integer codes, held in float32.

        Returns:
            Real values, in input units.
        """

    def steps(self, values: Float[Array, "..."]) -> Float[Array, "..."]:
        """Quantizes values and measures them in units of `scale`.

        Args:
            values: Real values, in input units.

        Returns:
            Quantized values over the scale: code minus zero point where the quantizer is uniform.
        """

    def free(self, powers_of_two: bool = False) -> Free:
        """Returns the values that can be moved, as they stand now.

        Args:
            powers_of_two: Whether its scales are power-of-two multiples of the smallest, and stay so: the smallest is
                then `scale`, and the multiples are `exponents`.

        Returns:
            The values in the units that `Free` documents. `with_free` of them gives the same quantizer.
        """

    def with_free(self, free: Free) -> Self:
        """Puts moved values in place.

        Args:
            free: The values. A field that is None stays; `bias` belongs to the layer and is ignored.

        Returns:
            The quantizer with these values.
        """

    def with_rounding(self, rounding: Float[Array, "inputs outputs"]) -> Self:
        """Replaces the learned rounding of a weight quantizer.

        Args:
            rounding: What is added to each element before rounding, in steps.

        Returns:
            The quantizer with that rounding; itself where its class has none.
        """

    def free_units(self) -> Free:
        """Returns how much of each field of `free()` is one step of its grid.

        A field that is measured otherwise is None.
        """


class ScaledQuantizer:
    """Defaults for a quantizer class with a field `scale`, of which nothing else can be moved.

    Attributes:
        scale: Input units per step, see `Quantizer.scale`.

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
        """Returns the quantizer with another scale, see `Quantizer.with_scale`."""
        return replace(self, scale=scale)  # type: ignore[type-var]

    def codes(self, values: Float[Array, "..."]) -> Float[Array, "..."]:
        """Returns the codes of real values; each class defines it, see `Quantizer.codes`.

        Raises:
            NotImplementedError: The class does not define it.
        """
        raise NotImplementedError(f"{type(self).__name__} has to define codes()")

    def values(self, codes: Float[Array, "..."]) -> Float[Array, "..."]:
        """Returns the real values of codes; each class defines it, see `Quantizer.values`.

        Raises:
            NotImplementedError: The class does not define it.
        """
        raise NotImplementedError(f"{type(self).__name__} has to define values()")

    def steps(self, values: Float[Array, "..."]) -> Float[Array, "..."]:
        """Returns quantized values over the scale; the derivative is that of the values, as if nothing were clipped."""
        return straight_through(true_divide(self.values(self.codes(values)), self.scale), values / self.scale)

    def free(self, powers_of_two: bool = False) -> Free:
        """Returns the scale, or with `powers_of_two` the smallest scale and the exponents."""
        scale = jnp.asarray(self.scale)
        return Free(jnp.min(scale), exponents=free_exponents(scale)) if powers_of_two else Free(scale)

    def with_free(self, free: Free) -> Self:
        """Returns the quantizer with a moved scale, see `Quantizer.with_free`."""
        return self if free.scale is None else self.with_scale(place_scale(self.scale, free))

    def with_rounding(self, rounding: Float[Array, "inputs outputs"]) -> Self:
        """Returns the quantizer itself: it has no learned rounding."""
        return self

    def free_units(self) -> Free:
        """Returns no units: a scale is measured by its logarithm."""
        return Free()


class WrappedQuantizer:
    """Defaults for a quantizer class that wraps another quantizer.

    Attributes:
        base: The wrapped quantizer.
    """

    base: Any

    @property
    def scale(self) -> Float[Array, "..."]:
        """The scale of the wrapped quantizer."""
        return self.base.scale

    def with_scale(self, scale: Float[Array, "..."]) -> Self:
        """Returns the quantizer with another scale, see `Quantizer.with_scale`."""
        return replace(self, base=self.base.with_scale(scale))  # type: ignore[type-var]

    def codes(self, values: Float[Array, "..."]) -> Float[Array, "..."]:
        """Returns the wrapped quantizer's codes of real values."""
        return self.base.codes(values)

    def values(self, codes: Float[Array, "..."]) -> Float[Array, "..."]:
        """Returns the real values that the wrapped quantizer's codes stand for."""
        return self.base.values(codes)

    def steps(self, values: Float[Array, "..."]) -> Float[Array, "..."]:
        """Returns the wrapped quantizer's steps, in units of the scale."""
        return self.base.steps(values)

    def free(self, powers_of_two: bool = False) -> Free:
        """Returns the values of the wrapped quantizer that can be moved."""
        return self.base.free(powers_of_two)

    def with_free(self, free: Free) -> Self:
        """Returns the quantizer with moved values in the wrapped one."""
        return replace(self, base=self.base.with_free(free))  # type: ignore[type-var]

    def with_rounding(self, rounding: Float[Array, "inputs outputs"]) -> Self:
        """Returns the quantizer with another learned rounding in the wrapped one."""
        return replace(self, base=self.base.with_rounding(rounding))  # type: ignore[type-var]

    def free_units(self) -> Free:
        """Returns the units of the wrapped quantizer."""
        return self.base.free_units()


def unwrap(quantizer: Quantizer) -> Any:
    """Removes everything that wraps a quantizer: bias correction, a low-rank term.

    Args:
        quantizer: The quantizer.

    Returns:
        The innermost quantizer.
    """
    return unwrap(quantizer.base) if isinstance(quantizer, WrappedQuantizer) else quantizer
