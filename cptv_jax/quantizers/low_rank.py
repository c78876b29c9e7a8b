"""Low-rank compensation: a float term of few values that is added to a quantized weight."""

from dataclasses import dataclass, replace
from typing import Self

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from cptv_jax.quantizers.base import WrappedQuantizer
from cptv_jax.quantizers.free import Free
from cptv_jax.quantizers.uniform import Uniform


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LowRank(WrappedQuantizer):
    """A weight quantizer and the term down @ up that its layer adds to the quantized weight (AIQViT, equation 5).

    A layer computes x @ quantized + (x @ down) @ up. Columns of `down` and rows of `up` beyond a layer's own rank are
    zero, so that all layers of a kind share one compiled program; a deployed model leaves them out.

    Attributes:
        base: The weight's quantizer.
        down: First factor of the term, float32.
        up: Second factor of the term, float32.
    """

    base: Uniform
    down: Float[Array, "inputs rank"]
    up: Float[Array, "rank outputs"]

    @property
    def factors(self) -> tuple[Float[Array, "inputs rank"], Float[Array, "rank outputs"]]:
        """The factors of the term, whose product is added to the weight."""
        return self.down, self.up

    @property
    def rank(self) -> Int[Array, ""]:
        """How many columns of `down` are not zero."""
        return jnp.sum(jnp.any(self.down != 0, 0))

    def free(self, powers_of_two: bool = False) -> Free:
        """Returns the free values of the base, and the factors of the term as its own."""
        return replace(self.base.free(powers_of_two), own={"down": self.down, "up": self.up})

    def with_free(self, free: Free) -> Self:
        """Returns the quantizer with moved values in the base, and moved factors."""
        return replace(super().with_free(free), **(free.own or {}))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class RankSearch(LowRank):
    """A LowRank whose rank is being chosen by differentiable architecture search (AIQViT; DARTS, Liu et al. 2019).

    The term is a mixture, by the softmax of the preferences, of the candidates' terms; that of rank r has the first r
    columns of `down`.

    Attributes:
        ranks: The candidates, increasing.
        preference: Logits of the candidates.
        penalty: Loss of a term as large as the weight itself.
    """

    ranks: Float[Array, " candidates"]
    preference: Float[Array, " candidates"]
    penalty: Float[Array, ""]

    def free(self, powers_of_two: bool = False) -> Free:
        """Returns the free values of a LowRank, and the preferences as its own."""
        found = super().free(powers_of_two)
        return replace(found, own={**(found.own or {}), "preference": self.preference})

    @property
    def gates(self) -> Float[Array, " rank"]:
        """How much of each column the mixture has: the probability that the chosen rank exceeds its index."""
        columns = jnp.arange(self.down.shape[1])
        return jnp.matmul(jax.nn.softmax(self.preference), (self.ranks[:, None] > columns).astype(jnp.float32))

    @property
    def factors(self) -> tuple[Float[Array, "inputs rank"], Float[Array, "rank outputs"]]:
        """The factors of the mixture's term."""
        return self.down * self.gates, self.up

    @property
    def price(self) -> Float[Array, ""]:
        """Loss of the expected number of values in the term."""
        inputs, outputs = self.down.shape[0], self.up.shape[1]
        return self.penalty * jnp.sum(self.gates) * (inputs + outputs) / (inputs * outputs)

    def choose(self) -> LowRank:
        """Returns the quantizer with the preferred rank alone; among equals, the largest."""
        preferred = len(self.ranks) - 1 - jnp.argmax(self.preference[::-1])
        kept = jnp.arange(self.down.shape[1]) < self.ranks[preferred]
        down, up = self.factors
        return LowRank(self.base, jnp.where(kept, down, 0.0), jnp.where(kept[:, None], up, 0.0))
