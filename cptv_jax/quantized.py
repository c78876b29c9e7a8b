"""Models as values: architecture and weights, with or without a recipe and quantizer parameters."""

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import PyTree

from cptv_jax.interpreters import Arithmetic, ArithmeticName, FakeQuant, StraightThrough, Tensor, quantize_weight
from cptv_jax.mesh import check_arithmetic, fastest_arithmetic
from cptv_jax.models.architecture import Architecture, Weights, call_stage, stage_graphs
from cptv_jax.quantizers import (
    BiasCorrected,
    LowRank,
    Quantizer,
    Uniform,
    exponents,
    innermost,
    moments,
    offsets,
    rounded_product,
    with_parameters,
    with_rounding,
)
from cptv_jax.recipe import Recipe
from cptv_jax.stages import Stage

_WEIGHT = ".weight"
_BIAS = "bias"
_EXPONENTS = "exponents"
_BIAS_UNIT = np.float32(0.1)
# Of what a candidate holds of a site, beside its scale: what a step is added to, and all.
_SHIFTED = (".zero_point", ".start", ".rounding", f".{_BIAS}", f".{_EXPONENTS}")
_OFFSETS = (*_SHIFTED, ".factor")


@dataclass(frozen=True)
class ModelStageFunction:
    """Computes a stage of a model from its state.

    The state has "weights", the module's arrays; "quantizers" by site; "quantized", the weights as matmuls read them,
    by site (their kernels among the module's arrays are empty); "searched", the kernels, and their moments, of the
    weights whose scales are searched; and "biases" of layers, by weight site, that move.

    differentiable: the same numbers with straight-through derivatives; it reads "weights", whole, and "quantizers".
    """

    graph: nnx.GraphDef[Any]
    integer_layer_norm: bool = False
    log_int_softmax: bool = False
    rounding: bool = True
    all_tokens: bool = False
    arithmetic: Arithmetic = Arithmetic()  # noqa: RUF009 - frozen
    differentiable: bool = False

    def __call__(self, state: PyTree, x: PyTree) -> PyTree:
        ops = (StraightThrough if self.differentiable else FakeQuant)(
            state["quantizers"],
            weights={} if self.differentiable else state["quantized"],
            arithmetic=self.arithmetic,
            all_tokens=self.all_tokens,
            integer_layer_norm=self.integer_layer_norm,
            log_int_softmax=self.log_int_softmax,
            rounding=self.rounding,
        )
        return call_stage(self.graph, ops, state["weights"], x if isinstance(x, Tensor) else Tensor(x))


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


def _path_of(site: str) -> list[str]:
    """Where a stage has the layer of a weight site."""
    return site.removesuffix(_WEIGHT).split(".")


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


_quantize_weight = jax.jit(quantize_weight)
_moments = jax.jit(moments)


def _state(weights: PyTree, quantizers: Mapping[str, Quantizer], searched: Collection[str]) -> dict[str, PyTree]:
    """A stage's state with its weights quantized once, so that no forward pass does it again."""
    quantized, kernels = {}, {}
    for site, quantizer in quantizers.items():
        if not site.endswith(_WEIGHT):
            continue
        path = _path_of(site)
        kernel = jnp.asarray(_at(weights, path)["kernel"])
        wanted = _moments(kernel)
        quantized[site] = _quantize_weight(quantizer, kernel, wanted)
        if site in searched:
            kernels[site] = (kernel, wanted)
        weights = _replaced(weights, path, {"kernel": jnp.zeros(0, kernel.dtype)})
    return {"weights": weights, "quantizers": dict(quantizers), "quantized": quantized, "searched": kernels}


def arithmetic_for(recipe: Recipe, name: ArithmeticName | None = None) -> Arithmetic:
    """How to multiply codes of a recipe's widths; None takes what is fastest here."""
    widths = {
        weight: [s.bits for site, s in recipe.sites.items() if site.endswith(_WEIGHT) == weight]
        for weight in (True, False)
    }
    if name is not None:
        check_arithmetic(name)
    return Arithmetic(name or fastest_arithmetic(), max(widths[True], default=8), max(widths[False], default=8))


def _steps_within_codes(quantizers: Iterable[Quantizer]) -> bool:
    """Whether every zero point is a code, so that steps are integers no larger than the largest code."""
    bases = (each.base if isinstance(each, BiasCorrected | LowRank) else each for each in quantizers)
    points = jax.device_get([(grid.zero_point, grid.low, grid.high) for grid in bases if isinstance(grid, Uniform)])
    return all(np.all((point == np.round(point)) & (low <= point) & (point <= high)) for point, low, high in points)


def _at(node: Mapping[str, Any], path: Iterable[str]) -> Mapping[str, Any]:
    for name in path:
        node = node[name]
    return node


def _replaced(node: Mapping[str, Any], path: list[str], arrays: Mapping[str, jax.Array]) -> dict[str, Any]:
    if not path:
        unknown = set(arrays) - set(node)
        if unknown:
            raise KeyError(f"the layer has no {sorted(unknown)}")
        return {**node, **arrays}
    return {**node, path[0]: _replaced(node[path[0]], path[1:], arrays)}


@dataclass(frozen=True)
class Model:
    """A full-precision model.

    weights: by stage. source, sha256: the file they came from.
    """

    architecture: Architecture
    weights: Weights
    source: str = ""
    sha256: str = ""

    def stages(self, *, all_tokens: bool = False, approximate: bool = False) -> tuple[Stage, ...]:
        """The stages of the float forward pass: the teacher.

        all_tokens: compute also the tokens of the last block that the head does not read. approximate: multiply in
            bfloat16, for what need not be exact.
        """
        arithmetic = Arithmetic(approximate=approximate)
        return tuple(
            Stage(
                name,
                ModelStageFunction(graph, all_tokens=all_tokens, arithmetic=arithmetic),
                _state(self.weights[name], {}, ()),
            )
            for name, graph in stage_graphs(self.architecture).items()
        )

    def layer(self, site: str) -> dict[str, jax.Array]:
        """Arrays of the linear layer (kernel, bias) or LayerNorm (weight, bias) at a site such as blocks.0.attn.qkv."""
        stage, path = self._path(site)
        return dict(_at(self.weights[stage], path))

    def with_layers(self, layers: Mapping[str, Mapping[str, jax.Array]]) -> "Model":
        """The same model with other arrays in the named layers."""
        weights = dict(self.weights)
        for site, arrays in layers.items():
            stage, path = self._path(site)
            weights[stage] = _replaced(weights[stage], path, arrays)
        return replace(self, weights=weights)

    def _path(self, site: str) -> tuple[str, list[str]]:
        stage = next(name for name in self.weights if site.startswith(name + "."))
        return stage, site.removeprefix(stage + ".").split(".")


@dataclass(frozen=True)
class QuantizedModel:
    """An immutable quantized model: float weights (perhaps rewritten by the method), recipe, quantizer parameters.

    quantizers: by full site name.
    """

    model: Model
    recipe: Recipe
    quantizers: Mapping[str, Quantizer]

    def stages(
        self,
        searched: Callable[[str], bool] = lambda site: False,
        *,
        shifted: bool = False,
        turned: bool = False,
        rounding: bool = True,
        all_tokens: bool = False,
        arithmetic: ArithmeticName | None = None,
        differentiable: bool = False,
    ) -> tuple[Stage, ...]:
        """The stages of the quantized forward pass.

        searched: which sites' scales form the candidates. shifted: and their zero points, intervals' starts, exponents
            of power-of-two factors, factors of channels, and biases of their layers. turned: with `shifted`, also the
            rounding of each weight's elements.
        rounding: False is the published code's "full-precision" pass, where integer LayerNorm (and softmax) still act.
        all_tokens: compute also the tokens of the last block that the head does not read.
        arithmetic: how codes are multiplied; None takes what is fastest here. The results are the same, but with
            zero points that are no codes (of a range that lies beside zero), whose steps only "float32" can hold.
        differentiable: with straight-through derivatives by state and candidate; weights are quantized in every pass.
        """
        if not _steps_within_codes(self.quantizers.values()):
            arithmetic = "float32"
        exact = arithmetic_for(self.recipe, arithmetic)
        stages = []
        for name, graph in stage_graphs(self.model.architecture).items():
            prefix = name + "."
            quantizers = {
                site.removeprefix(prefix): quantizer
                for site, quantizer in self.quantizers.items()
                if site.startswith(prefix)
            }
            weights = self.model.weights[name]
            if turned:
                quantizers = _with_roundings(quantizers, weights, [s for s in quantizers if searched(prefix + s)])
            chosen = {site: quantizer for site, quantizer in quantizers.items() if searched(prefix + site)}
            biases = _biases(weights, chosen) if shifted else None
            candidate = _candidate(chosen, self.recipe, prefix, biases)
            function = ModelStageFunction(
                graph,
                self.recipe.integer_layer_norm,
                self.recipe.log_int_softmax,
                rounding,
                all_tokens,
                exact,
                differentiable,
            )
            if rounding and not differentiable:
                state = _state(weights, quantizers, chosen)
            else:
                state = {"weights": weights, "quantizers": quantizers, "quantized": {}, "searched": {}}
            state["biases"] = biases or {}
            stages.append(Stage(name, function, state, candidate, bind_candidate, move_candidate))
        return tuple(stages)

    def with_parameters(self, parameters: Mapping[str, jax.Array]) -> "QuantizedModel":
        """The same model with other parameters at the named sites: "SITE" is a scale, "SITE.zero_point" an offset, and
        "SITE.bias" how far the bias of a weight's layer moves.
        """
        model, changed = self.model, {}
        for site, found in _by_site(jax.tree.map(jnp.asarray, dict(parameters))).items():
            if _BIAS in found:
                stage, path = model._path(site)
                (bias,) = _biases(model.weights[stage], [".".join(path)]).values()
                model = model.with_layers({site.removesuffix(_WEIGHT): {_BIAS: bias.moved(found.pop(_BIAS))}})
            changed[site] = with_parameters(self.quantizers[site], found)
        return replace(self, model=model, quantizers={**self.quantizers, **changed})
