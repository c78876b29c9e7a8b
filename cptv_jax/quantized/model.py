"""Models as values: architecture and weights, with or without a recipe and quantizer parameters."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp

from cptv_jax.interpreters import Arithmetic, ArithmeticName
from cptv_jax.models.architecture import Architecture, Weights, stage_graphs
from cptv_jax.quantized.candidate import (
    _BIAS,
    _biases,
    _by_site,
    _candidate,
    _with_roundings,
    bind_candidate,
    move_candidate,
)
from cptv_jax.quantized.execution import ModelStageFunction, _state, _steps_within_codes, arithmetic_for
from cptv_jax.quantized.layers import _WEIGHT, _at, _replaced
from cptv_jax.quantizers import (
    Quantizer,
    with_parameters,
)
from cptv_jax.recipe.spec import Recipe
from cptv_jax.runtime.stages import Stage


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
        stage = max((name for name in self.weights if site.startswith(name + ".")), key=len)
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
            places = self.recipe.places
            quantizers = {places[s].local: q for s, q in self.quantizers.items() if places[s].stage == name}
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
