"""Candidates: the parameters of a stage's quantizers that a search or a reconstruction may change."""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from cptv_jax.interpreters import quantize_weight
from cptv_jax.quantized.layers import _WEIGHT, _at, _path_of, _replaced
from cptv_jax.quantizers import (
    Quantizer,
    exponents,
    innermost,
    offsets,
    rounded_product,
    with_parameters,
    with_rounding,
)
from cptv_jax.recipe.spec import Recipe

_BIAS = "bias"
_EXPONENTS = "exponents"
_BIAS_UNIT = np.float32(0.1)
# Of what a candidate holds of a site, beside its scale: what a step is added to, and all.
_SHIFTED = (".zero_point", ".start", ".rounding", f".{_BIAS}", f".{_EXPONENTS}")
_OFFSETS = (*_SHIFTED, ".factor")


def _by_site(candidate: Mapping[str, jax.Array]) -> dict[str, dict[str, jax.Array]]:
    """Parameters by site and name, of a candidate: "SITE" is a site's scale, "SITE.zero_point" and the like others, and
    "SITE.bias" how far the bias of a weight's layer moves (see MovableBias).
    """
    found: dict[str, dict[str, jax.Array]] = {}
    for key, value in candidate.items():
        site, _, name = key.rpartition(".") if key.endswith(_OFFSETS) else (key, "", "scale")
        found.setdefault(site, {})[name] = value
    return found


class MovableBias(NamedTuple):
    """A layer's bias, [outputs], from where a candidate's "SITE.bias" moves it in units.

    unit: a tenth of the length of every output's weights, that is of how far it deviates for inputs of deviation 1, so
        that a step means the same in every layer, and as much as a step of a scale.
    """

    start: jax.Array
    unit: jax.Array

    def moved(self, steps: jax.Array) -> jax.Array:
        return self.start + rounded_product(steps, self.unit)


def _biases(weights: PyTree, sites: Iterable[str]) -> dict[str, MovableBias]:
    """By weight site, of layers that have a bias. On the host: the same numbers for every program."""
    layers = {site: _at(weights, _path_of(site)) for site in sites if site.endswith(_WEIGHT)}
    return {
        site: MovableBias(layer[_BIAS], jnp.asarray(_BIAS_UNIT * np.linalg.norm(np.asarray(layer["kernel"]), axis=0)))
        for site, layer in layers.items()
        if layer.get(_BIAS) is not None
    }


def _with_roundings(quantizers: Mapping[str, Quantizer], weights: PyTree, sites: Iterable[str]) -> dict[str, Quantizer]:
    """The quantizers with a learned rounding, which so far adds nothing, at the weights among the sites."""
    kernels = {site: _at(weights, _path_of(site))["kernel"] for site in sites if site.endswith(_WEIGHT)}
    lacking = [site for site in kernels if getattr(innermost(quantizers[site]), "rounding", None) is None]
    return {**quantizers, **{s: with_rounding(quantizers[s], jnp.zeros(jnp.shape(kernels[s]))) for s in lacking}}


def _candidate(
    quantizers: Mapping[str, Quantizer], recipe: Recipe, prefix: str, biases: Mapping[str, MovableBias] | None
) -> dict[str, jax.Array]:
    """The parameters of quantizers, as a candidate.

    prefix: of the sites' names in the recipe. biases: of the weights' layers, which move with all other
    offsets; None is without any.
    """
    found = {}
    for site, quantizer in quantizers.items():
        spec = recipe.sites[prefix + site]
        scale = jnp.asarray(quantizer.scale)
        powers = spec.observer == "ptf"
        found[site] = jnp.min(scale) if powers else scale  # power-of-two factors must stay such
        if biases is not None:
            if powers:
                found[f"{site}.{_EXPONENTS}"] = exponents(quantizer)
            fixed = {"zero_point"} if spec.symmetric else set()
            found |= {f"{site}.{name}": value for name, value in offsets(quantizer).items() if name not in fixed}
            if site in biases:
                found[f"{site}.{_BIAS}"] = jnp.zeros_like(biases[site].start)
    return found


def move_candidate(candidate: Mapping[str, jax.Array], steps: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """A candidate whose scales and factors are multiplied by a step's exponential, and whose other offsets and biases
    are shifted.
    """
    return {
        key: value + steps[key] if key.endswith(_SHIFTED) else value * jnp.exp(steps[key])
        for key, value in candidate.items()
    }


def bind_candidate(state: PyTree, candidate: Mapping[str, jax.Array]) -> PyTree:
    """The state with the parameters of the candidate's sites replaced; a searched scale is positive by construction.

    Only the candidate's weights are quantized anew.
    """
    quantizers, quantized, weights = dict(state["quantizers"]), dict(state["quantized"]), state["weights"]
    for site, values in _by_site(candidate).items():
        if _BIAS in values:
            moved = state["biases"][site].moved(values.pop(_BIAS))
            weights = _replaced(weights, _path_of(site), {_BIAS: moved})
        quantizers[site] = with_parameters(quantizers[site], values)
        if site in state["searched"]:
            quantized[site] = quantize_weight(quantizers[site], *state["searched"][site])
    return {**state, "weights": weights, "quantizers": quantizers, "quantized": quantized}
