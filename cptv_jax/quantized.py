"""Models as values: architecture and weights, with or without a recipe and quantizer parameters."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import PyTree

from cptv_jax.interpreters import FakeQuant, Tensor
from cptv_jax.models.architecture import Architecture, Weights, call_stage, stage_graphs
from cptv_jax.quantizers import Quantizer
from cptv_jax.recipe import Recipe
from cptv_jax.stages import Stage


@dataclass(frozen=True)
class ModelStageFunction:
    """Computes a stage of a model from {"weights": ..., "quantizers": {site: quantizer}}."""

    graph: nnx.GraphDef[Any]
    integer_layer_norm: bool = False
    log_int_softmax: bool = False
    rounding: bool = True

    def __call__(self, state: PyTree, x: PyTree) -> PyTree:
        ops = FakeQuant(
            state["quantizers"],
            integer_layer_norm=self.integer_layer_norm,
            log_int_softmax=self.log_int_softmax,
            rounding=self.rounding,
        )
        return call_stage(self.graph, ops, state["weights"], x if isinstance(x, Tensor) else Tensor(x))


def bind_scales(state: PyTree, candidate: Mapping[str, jax.Array]) -> PyTree:
    """The state with the scales of the candidate's sites replaced; a searched scale is positive by construction."""
    quantizers = dict(state["quantizers"])
    for site, scale in candidate.items():
        quantizers[site] = quantizers[site].with_scale(scale)
    return {**state, "quantizers": quantizers}


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

    def stages(self) -> tuple[Stage, ...]:
        """The stages of the float forward pass: the teacher."""
        return tuple(
            Stage(name, ModelStageFunction(graph), {"weights": self.weights[name], "quantizers": {}})
            for name, graph in stage_graphs(self.architecture).items()
        )

    def layer(self, site: str) -> dict[str, jax.Array]:
        """Arrays of the linear layer (kernel, bias) or LayerNorm (weight, bias) at a site such as blocks.0.attn.qkv."""
        stage, path = self._path(site)
        node = self.weights[stage]
        for name in path:
            node = node[name]
        return dict(node)

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
        self, searched: Callable[[str], bool] = lambda site: False, *, rounding: bool = True
    ) -> tuple[Stage, ...]:
        """The stages of the quantized forward pass.

        searched: which sites' scales form the candidates.
        rounding: False is the published code's "full-precision" pass, where integer LayerNorm (and softmax) still act.
        """
        stages = []
        for name, graph in stage_graphs(self.model.architecture).items():
            prefix = name + "."
            quantizers = {
                site.removeprefix(prefix): quantizer
                for site, quantizer in self.quantizers.items()
                if site.startswith(prefix)
            }
            candidate = {
                site: jnp.asarray(quantizer.scale) for site, quantizer in quantizers.items() if searched(prefix + site)
            }
            function = ModelStageFunction(graph, self.recipe.integer_layer_norm, self.recipe.log_int_softmax, rounding)
            state = {"weights": self.model.weights[name], "quantizers": quantizers}
            stages.append(Stage(name, function, state, candidate, bind_scales))
        return tuple(stages)

    def with_scales(self, scales: Mapping[str, jax.Array]) -> "QuantizedModel":
        """The same model with other scales at the named sites."""
        changed = {site: self.quantizers[site].with_scale(jnp.asarray(scale)) for site, scale in scales.items()}
        return replace(self, quantizers={**self.quantizers, **changed})
