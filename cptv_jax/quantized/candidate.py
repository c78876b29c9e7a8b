"""Candidates: what of a stage's sites a search or a reconstruction moves, by the sites' local names."""

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
    """What of a model is searched.

    Attributes:
        sites: Names, in the model, of the sites whose scales form the candidates. One whose quantizer has nothing to
            move is left out of them.
        offsets: Also their zero points, intervals' starts, exponents of power-of-two factors, factors of channels, and
            the biases of their layers.
        rounding: Also how the elements of their weights are rounded.
        own: Also what else their quantizer classes have to move, such as low-rank terms.
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
    """A layer's bias, [outputs], from where `Free.bias` moves it in units.

    unit: a tenth of the length of every output's weights, that is of how far it deviates for inputs of deviation 1, so
        that a step means the same in every layer, and as much as a step of a scale.
    """

    start: Float[Array, " outputs"]
    unit: Float[Array, " outputs"]

    def move(self, steps: Float[Array, " outputs"]) -> Float[Array, " outputs"]:
        return self.start + rounded_product(steps, self.unit)


@dataclass(frozen=True)
class StageParts:
    """What a stage is made of.

    Attributes:
        weights: The module's nested arrays.
        quantizers: By the local name of the site.
        specs: The recipe's specifications, likewise.
        layers: Paths in `weights` of the layers whose weights are quantized, by the weight's site.
        searched: The sites that are searched, in order.
    """

    weights: PyTree
    quantizers: Mapping[str, Quantizer]
    specs: Mapping[str, SiteSpec]
    layers: Mapping[str, Path]
    searched: tuple[str, ...] = ()

    def kernel(self, site: str) -> Float[Array, "inputs outputs"]:
        """The float weight at a site."""
        return arrays_at(self.weights, self.layers[site])["kernel"]

    def bias(self, site: str) -> MovableBias | None:
        """The bias of a weight's layer, if it has one. On the host: the same numbers for every program."""
        layer = arrays_at(self.weights, self.layers[site])
        if layer.get("bias") is None:
            return None
        unit = _BIAS_UNIT * np.linalg.norm(np.asarray(layer["kernel"]), axis=0)
        return MovableBias(layer["bias"], jnp.asarray(unit))

    def with_roundings(self) -> "StageParts":
        """The same with a learned rounding, which so far adds nothing, in each searched weight that can have one."""
        lacking = [
            site
            for site in self.searched
            if site in self.layers and getattr(unwrap(self.quantizers[site]), "rounding", None) is None
        ]
        made = {s: self.quantizers[s].with_rounding(jnp.zeros(jnp.shape(self.kernel(s)))) for s in lacking}
        return replace(self, quantizers={**self.quantizers, **made})

    def candidate(self, space: Space, biases: Mapping[str, MovableBias]) -> Candidate:
        """What a space has of the searched sites, as it stands. biases: of the weights' layers."""
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
    """Places a candidate in the state of a stage. Stages that are alike have equal ones.

    layers: the searched weights' sites and the paths of their layers.
    """

    layers: tuple[tuple[str, Path], ...] = ()

    def __call__(self, state: PyTree, candidate: Candidate) -> PyTree:
        """The state with the values of the candidate's sites in place.

        A searched scale is positive by construction. Only the candidate's weights are quantized anew.
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
    """A stage's weights and quantizers with a candidate in place, as a model holds them."""
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
