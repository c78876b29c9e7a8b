"""Candidates: the values of a stage's sites that a search or a reconstruction moves, by the sites' local names."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from cptv_jax.interpreters import quantize_weight
from cptv_jax.quantized.layers import Path, arrays_at, replace_arrays
from cptv_jax.quantizers import Free, Quantizer, rounded_product, unwrap
from cptv_jax.recipe.spec import SiteSpec

Candidate = dict[str, Free]

_BIAS_UNIT = np.float32(0.1)
_OFFSETS = ("bias", "exponents", "factor", "start", "zero_point")


@dataclass(frozen=True)
class Space:
    """Which parts of a model are searched.

    Attributes:
        sites: Names, in the model, of the sites whose scales form the candidates. A site whose quantizer has nothing to
            move is left out.
        offsets: Whether to include their zero points, intervals' starts, exponents of power-of-two factors, factors of
            channels, and the biases of their layers.
        rounding: Whether to include how the elements of their weights are rounded.
        own: Whether to include what else their quantizer classes have to move, such as low-rank terms.

    Example:
        >>> weights = [site.name for site in sites_of(model.architecture) if site.role == "weight"]
        >>> stages = quantized.stages(Simulated(), Space(weights, offsets=True))
    """

    sites: Collection[str] = frozenset()
    offsets: bool = False
    rounding: bool = False
    own: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "sites", frozenset(self.sites))

    @property
    def fields(self) -> tuple[str, ...]:
        """The fields of Free that candidates may have."""
        chosen = {"rounding": self.rounding, "own": self.own}
        return ("scale", *(_OFFSETS if self.offsets else ()), *(name for name, wanted in chosen.items() if wanted))


class MovableBias(NamedTuple):
    """A layer's bias, and the unit in which `Free.bias` moves it.

    Attributes:
        start: The bias before it moves, in output units.
        unit: A tenth of the length of every output's weights, that is of how far it deviates for inputs of deviation 1,
            so that a step means the same in every layer, and as much as a step of a scale.
    """

    start: Float[Array, " outputs"]
    unit: Float[Array, " outputs"]

    def move(self, steps: Float[Array, " outputs"]) -> Float[Array, " outputs"]:
        """Moves the bias.

        Args:
            steps: How far, in units.

        Returns:
            The moved bias.
        """
        return self.start + rounded_product(steps, self.unit)


@dataclass(frozen=True)
class StageParts:
    """The parts of a stage.

    Attributes:
        weights: The module's nested arrays.
        quantizers: The quantizers, by the local name of the site.
        specs: The recipe's specifications, by the local name of the site.
        layers: Paths in `weights` of the layers whose weights are quantized, by the weight's site.
        searched: The sites that are searched, in order.
    """

    weights: PyTree
    quantizers: Mapping[str, Quantizer]
    specs: Mapping[str, SiteSpec]
    layers: Mapping[str, Path]
    searched: tuple[str, ...] = ()

    def kernel(self, site: str) -> Float[Array, "inputs outputs"]:
        """Returns the float weight at a site.

        Args:
            site: The weight's local name.
        """
        return arrays_at(self.weights, self.layers[site])["kernel"]

    def bias(self, site: str) -> MovableBias | None:
        """Finds the bias of a weight's layer.

        Its unit is computed on the host, so that every program has the same numbers.

        Args:
            site: The weight's local name.

        Returns:
            The bias, or None where the layer has none.
        """
        layer = arrays_at(self.weights, self.layers[site])
        if layer.get("bias") is None:
            return None
        unit = _BIAS_UNIT * np.linalg.norm(np.asarray(layer["kernel"]), axis=0)
        return MovableBias(layer["bias"], jnp.asarray(unit))

    def with_roundings(self) -> "StageParts":
        """Adds a learned rounding, which so far adds nothing, to each searched weight that can have one.

        Returns:
            The parts with these quantizers.
        """
        lacking = [
            site
            for site in self.searched
            if site in self.layers and getattr(unwrap(self.quantizers[site]), "rounding", None) is None
        ]
        made = {s: self.quantizers[s].with_rounding(jnp.zeros(jnp.shape(self.kernel(s)))) for s in lacking}
        return replace(self, quantizers={**self.quantizers, **made})

    def candidate(self, space: Space, biases: Mapping[str, MovableBias]) -> Candidate:
        """Makes the candidate of a space: the present values of the searched sites.

        Args:
            space: Which fields are free.
            biases: The biases of the weights' layers, by the weight's site.

        Returns:
            The candidate; sites with nothing to move are left out.
        """
        found = {}
        for site in self.searched:
            spec = self.specs[site]
            free = self.quantizers[site].free(powers_of_two=spec.observer == "ptf").only(*space.fields)
            if spec.symmetric:
                free = replace(free, zero_point=None)
            if site in biases:
                free = replace(free, bias=jnp.zeros_like(biases[site].start))
            if free.names:
                found[site] = free
        return found


@dataclass(frozen=True)
class Binding:
    """Places a candidate in the state of a stage. Stages that compute alike have equal bindings.

    Attributes:
        layers: The searched weights' sites and the paths of their layers.
    """

    layers: tuple[tuple[str, Path], ...] = ()

    def __call__(self, state: PyTree, candidate: Candidate) -> PyTree:
        """Places a candidate.

        A searched scale is positive by construction. Only the candidate's weights are quantized again.

        Args:
            state: The stage's state, see `Execution.state`.
            candidate: The values to place, by site.

        Returns:
            The state with the values in place.
        """
        quantizers, quantized, weights = dict(state["quantizers"]), dict(state["quantized"]), state["weights"]
        paths = dict(self.layers)
        for site, free in candidate.items():
            if free.bias is not None:
                weights = replace_arrays(weights, paths[site], {"bias": state["biases"][site].move(free.bias)})
            quantizers[site] = quantizers[site].with_free(free)
            if site in state["searched"]:
                quantized[site] = quantize_weight(quantizers[site], *state["searched"][site])
        return {**state, "weights": weights, "quantizers": quantizers, "quantized": quantized}


def place_candidate(parts: StageParts, candidate: Mapping[str, Free]) -> tuple[PyTree, dict[str, Quantizer]]:
    """Places a candidate in a stage's weights and quantizers, as a model holds them.

    Args:
        parts: The stage.
        candidate: The values to place, by site.

    Returns:
        The weights and the quantizers.

    Raises:
        ValueError: A bias is given for a layer that has none.
    """
    weights, quantizers = parts.weights, dict(parts.quantizers)
    for site, values in candidate.items():
        free: Any = jax.tree.map(jnp.asarray, values)
        if free.bias is not None:
            bias = parts.bias(site)
            if bias is None:
                raise ValueError(f"the layer of {site} has no bias to move")
            weights = replace_arrays(weights, parts.layers[site], {"bias": bias.move(free.bias)})
        quantizers[site] = quantizers[site].with_free(free)
    return weights, quantizers
