"""What every quantizer offers to the interpreters and to the search."""

from typing import Protocol, Self, runtime_checkable

from jaxtyping import Array, Float


@runtime_checkable
class Quantizer(Protocol):
    """A pure function pair (codes from values, values from codes) and the pytree of its parameters.

    Implementations are frozen dataclasses registered as pytrees, so a quantizer can be vmapped over (a population),
    differentiated, sharded and saved like any array. Codes are integers held in float32, exact below 2^24.
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
