"""The value that flows through a forward pass: an array and, once quantized, the step that it is measured in."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Self

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from cptv_jax.quantizers.rounding import rounded_product


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Tensor:
    """An array that stands for (stored - zero) * scale; without a zero, stored * scale; without a scale, stored itself.

    Attributes:
        stored: uint8 codes, counted from the lowest code of their quantizer, if there is a zero; else float32.
        scale: Input units per step, (), (channels,) or (heads, 1, 1); None for a value that no quantizer has touched.
        zero: The stored code of the value 0, float32; broadcasts with scale.
    """

    stored: Shaped[Array, "..."]
    scale: Float[Array, "..."] | None = None
    zero: Float[Array, "..."] | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the array."""
        return self.stored.shape

    @property
    def steps(self) -> Float[Array, "..."]:
        """The array in units of `scale`, float32: integers after a uniform quantizer."""
        return self.stored if self.zero is None else self.stored.astype(jnp.float32) - self.zero

    @property
    def values(self) -> Float[Array, "..."]:
        """The array in input units, float32, rounded once."""
        return self.steps if self.scale is None else rounded_product(self.steps, self.scale)

    def move(self, movement: Callable[[Array], Array]) -> Self:
        """Reshapes, transposes or slices; where the scale is per channel the last axis must stay.

        Args:
            movement: Applied to the stored array.

        Returns:
            The moved tensor, with the same scale and zero.
        """
        return replace(self, stored=movement(self.stored))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Accumulated(Tensor):
    """A product of activations on its way to its site: sums of products of steps, and the product of the scales.

    Its values are not rounded by themselves: the compiler may contract the product with a sum that follows, as it does
    in the published code's matmuls.
    """

    @property
    def values(self) -> Float[Array, "..."]:
        """The array in input units, float32, not yet rounded."""
        return self.steps if self.scale is None else self.steps * self.scale
