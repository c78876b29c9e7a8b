"""The value that flows through a forward pass: an array and, once quantized, the step it is measured in."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Self

import jax
from jaxtyping import Array, Float


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Tensor:
    """steps * scale, or plain values when scale is None.

    steps: float32. After a uniform quantizer these are integers (code minus zero point), so a matmul of steps is
        exact integer arithmetic while its sums stay below 2^24.
    scale: input units per step, () or (channels,); None for a value that no quantizer has touched.
    """

    steps: Float[Array, "..."]
    scale: Float[Array, "..."] | None = None

    @property
    def values(self) -> Float[Array, "..."]:
        return self.steps if self.scale is None else self.steps * self.scale

    def move(self, movement: Callable[[Array], Array]) -> Self:
        """Reshape, transpose or slice; the last axis must survive where the scale is per channel."""
        return replace(self, steps=movement(self.steps))
