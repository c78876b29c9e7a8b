"""Free: the values of a quantized site that may move, and how a step moves them."""

from dataclasses import dataclass, fields, replace
from typing import Any, Self

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from cptv_jax.quantizers.rounding import true_divide
from cptv_jax.quantizers.straight_through import straight_through

LARGEST_EXPONENT = 3  # of power-of-two factors
_OCTAVES = 25.0  # a random step of one percent then moves one channel in twenty
_MULTIPLIED = frozenset({"scale", "factor"})
_MARK = "__free__"  # no site has this name

# An array; in a population it has a leading axis, and a strategy may hold it in NumPy's float64.
Values = Any


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Free:
    """The values of one site that a search or a reconstruction moves; None is fixed.

    A candidate of a stage is a dictionary of these by the site's local name. The same class holds the steps that move a
    candidate. The order of the fields is that of the leaves, and so of the random numbers that strategies draw.

    Attributes:
        scale: Input units per step, of the shape of the quantizer's scale. A scalar for a quantizer with a scale per
            channel moves all channels by one factor.
        bias: How far the bias of a weight's layer has moved, [outputs], in tenths of the length of each output's
            weights. It belongs to the layer, not to the quantizer, which ignores it.
        exponents: Exponents of power-of-two factors (FQ-ViT, section 3.2), [channels], in units of 25 octaves. They are
            rounded to whole octaves from 0 to 3 and count from `scale`, which must be given with them.
        factor: Multiplies each channel of a bias-corrected weight, [outputs].
        rounding: What is added to a weight's elements before they are rounded, [inputs, outputs], in units of two
            steps, so that one rate serves roundings and scales.
        start: The lower end of a focusing interval, as a fraction of the interval's length.
        zero_point: The zero point as a fraction of the range of codes, so that it means the same at every width;
            rounded to a code.
        own: What else a quantizer class has to move, by names of its own; steps are added.

    Example:
        >>> free = Free(scale=jnp.array(0.5), zero_point=jnp.array(0.25))
        >>> free.move(Free(scale=jnp.array(0.1))).names
        ('scale', 'zero_point')
    """

    scale: Values = None
    bias: Values = None
    exponents: Values = None
    factor: Values = None
    rounding: Values = None
    start: Values = None
    zero_point: Values = None
    own: dict[str, Values] | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """The fields that are free."""
        return tuple(field.name for field in fields(self) if getattr(self, field.name) is not None)

    def only(self, *names: str) -> Self:
        """Fixes every field but the named ones.

        Args:
            *names: The fields that stay free.

        Returns:
            The same values in these fields, and None in all others.
        """
        return replace(self, **{name: None for name in self.names if name not in names})

    def move(self, steps: "Free") -> "Free":
        """Moves the values by a step.

        Args:
            steps: Steps of the same shapes. Scales and factors are multiplied by the exponential of theirs, which keeps
                them positive; to everything else they are added. A field that is None in the steps stays.

        Returns:
            The moved values.
        """

        def move(name: str) -> Values:
            value, step = getattr(self, name), getattr(steps, name)
            if step is None:
                return value
            if name in _MULTIPLIED:
                return value * jnp.exp(step)
            return jax.tree.map(lambda old, change: old + change, value, step)

        return Free(**{name: move(name) for name in self.names})

    def to_arrays(self) -> dict[str, Any]:
        """Returns the free fields as a plain dictionary of arrays; `own` is a dictionary within it."""
        return {name: getattr(self, name) for name in self.names}


def move_candidate(candidate: dict[str, Free], steps: dict[str, Free]) -> dict[str, Free]:
    """Moves a stage's candidate by a step, see `Free.move`.

    Args:
        candidate: The values by the sites' local names.
        steps: Steps for the same sites.

    Returns:
        The moved candidate.
    """
    return {site: free.move(steps[site]) for site, free in candidate.items()}


def free_to_plain(tree: PyTree) -> PyTree:
    """Replaces each Free in a tree by plain dictionaries, which a file can hold. Inverse: `free_from_plain`.

    Args:
        tree: A pytree.

    Returns:
        The tree with dictionaries.
    """

    def to_plain(node: Any) -> Any:
        return {_MARK: node.to_arrays()} if isinstance(node, Free) else node

    return jax.tree.map(to_plain, tree, is_leaf=lambda node: isinstance(node, Free))


def free_from_plain(tree: PyTree) -> PyTree:
    """Restores the tree that `free_to_plain` was given.

    Args:
        tree: Nested dictionaries.

    Returns:
        The tree with each Free in place.
    """
    if not isinstance(tree, dict):
        return tree
    if set(tree) == {_MARK}:
        return Free(**tree[_MARK])
    return {name: free_from_plain(node) for name, node in tree.items()}


# ---- shared by quantizer classes ------------------------------------------------------------------------------------


def free_exponents(scale: Float[Array, " channels"]) -> Float[Array, " channels"]:
    """Computes `Free.exponents` of scales that are power-of-two multiples of the smallest one.

    Args:
        scale: The scales.

    Returns:
        The exponents, in units of 25 octaves.
    """
    return true_divide(jnp.round(jnp.log2(true_divide(scale, jnp.min(scale)))), _OCTAVES)


def _powers_of_two(exponents: Float[Array, " channels"]) -> Float[Array, " channels"]:
    """Returns 2^exponent for exponents rounded and clipped to whole octaves; the derivative is straight-through."""
    octaves = jnp.clip(exponents * _OCTAVES, 0, LARGEST_EXPONENT)
    exact = jnp.ldexp(jnp.float32(1), jnp.round(octaves).astype(jnp.int32))  # exp2 need not be exact
    return straight_through(exact, jnp.exp2(octaves))


def place_scale(present: Float[Array, "..."], free: Free) -> Float[Array, "..."]:
    """Puts `free.scale` and `free.exponents` in place of a quantizer's scale.

    Args:
        present: The quantizer's scale so far. If `free.scale` is a scalar and no exponents are given, its channels keep
            their factors, which are powers of two if they were before.
        free: The values, of which `scale` and `exponents` are read.

    Returns:
        The scale, of the shape of the present one.
    """
    if free.scale is None:
        return present
    if free.exponents is not None:
        return free.scale * _powers_of_two(free.exponents)
    if jnp.ndim(free.scale) < jnp.ndim(present):
        return free.scale * true_divide(present, jnp.min(present))
    return jnp.asarray(free.scale)


def place_zero_point(
    fraction: Float[Array, "..."], present: Float[Array, "..."], low: Float[Array, ""], high: Float[Array, ""]
) -> Float[Array, "..."]:
    """Converts `Free.zero_point` to a zero point in codes, rounded and clipped; its derivative is straight-through.

    Args:
        fraction: The zero point as a fraction of the range of codes.
        present: The zero point so far. One that lies beyond the codes, as for a range that does not hold zero, may stay
            there.
        low: The smallest code.
        high: The largest code.

    Returns:
        The zero point, of the shape of `fraction`.
    """
    zero_point = fraction * (high - low)
    exact = jnp.clip(jnp.round(zero_point), jnp.minimum(low, present), jnp.maximum(high, present))
    return straight_through(exact, zero_point)
