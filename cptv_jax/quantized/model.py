"""Models as values: architecture and weights, with or without a recipe and quantizer parameters."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np

from cptv_jax.errors import InputError, did_you_mean
from cptv_jax.models.architecture import Architecture, Weights, stage_graphs
from cptv_jax.quantized.candidate import Binding, Space, StageParts, place_candidate
from cptv_jax.quantized.execution import Execution, FullPrecision, ModelStageFunction, Simulated
from cptv_jax.quantized.layers import Path, arrays_at, layers_by_name, path_of, replace_arrays, stage_sites
from cptv_jax.quantizers import Free, Quantizer, move_candidate
from cptv_jax.recipe.spec import Recipe
from cptv_jax.runtime.stages import Stage

_NO_RECIPE = Recipe("float", {}, integer_layer_norm=False, log_int_softmax=False)


@dataclass(frozen=True, repr=False)
class Model:
    """A full-precision model.

    Attributes:
        architecture: Its family and sizes.
        weights: Nested arrays by stage.
        source: The file that the weights came from.
        sha256: That file's digest.

    Example:
        >>> model = load_float_model("hub:timm/deit_tiny_patch16_224.fb_in1k")
        >>> logits = forward(model.stages(), images).logits
    """

    architecture: Architecture
    weights: Weights
    source: str = ""
    sha256: str = ""

    def __repr__(self) -> str:
        count = sum(int(np.size(leaf)) for leaf in jax.tree.leaves(self.weights))
        source = f", from {self.source}" if self.source else ""
        return f"Model({self.architecture.name}: {count:,} weights in {len(self.weights)} stages{source})"

    def stages(self, execution: Execution = FullPrecision()) -> tuple[Stage, ...]:  # noqa: B008 - frozen
        """Makes the stages of the float forward pass: the teacher.

        Args:
            execution: How it is computed.

        Returns:
            All stages in order.
        """
        return tuple(self.stage(name, execution) for name in stage_graphs(self.architecture))

    def stage(self, name: str, execution: Execution = FullPrecision()) -> Stage:  # noqa: B008 - frozen
        """Makes one stage of the float forward pass.

        Args:
            name: The stage's name, such as "blocks.3".
            execution: How it is computed.

        Returns:
            The stage.

        Raises:
            InputError: No stage has this name.
        """
        graph = _graph(self.architecture, name)
        operations = execution.operations(self.architecture, _NO_RECIPE, ())
        state = execution.state(StageParts(self.weights[name], {}, {}, {}))
        return Stage(name, ModelStageFunction(graph, operations), state | {"biases": {}}, {}, Binding(), move_candidate)

    def layer(self, name: str) -> dict[str, jax.Array]:
        """Finds the arrays of a layer.

        Args:
            name: The layer's name, such as "blocks.0.attn.qkv".

        Returns:
            "kernel" and "bias" of a linear layer, "weight" and "bias" of a LayerNorm.

        Raises:
            KeyError: No layer has this name.
        """
        stage, path = self._path(name)
        return dict(arrays_at(self.weights[stage], path))

    def with_layers(self, layers: Mapping[str, Mapping[str, jax.Array]]) -> "Model":
        """Replaces arrays in the named layers.

        Args:
            layers: The new arrays, by layer and name.

        Returns:
            The model with these arrays.

        Raises:
            KeyError: The model lacks a layer or an array.
        """
        weights = dict(self.weights)
        for name, arrays in layers.items():
            stage, path = self._path(name)
            weights[stage] = replace_arrays(weights[stage], path, arrays)
        return replace(self, weights=weights)

    def _path(self, name: str) -> tuple[str, Path]:
        known = layers_by_name(self.architecture)
        if name not in known:
            raise KeyError(f"the model has no layer {name}{did_you_mean(name, known)}")
        return known[name]


@dataclass(frozen=True, repr=False)
class QuantizedModel:
    """An immutable quantized model.

    Attributes:
        model: Architecture and float weights, perhaps rewritten by the method.
        recipe: What is quantized, and how.
        quantizers: The quantizers, by the site's name in the model.

    Example:
        >>> quantized = METHODS["fq-vit"].quantize(model, batches, recipe, jax.random.key(0))
        >>> logits = forward(quantized.stages(), images).logits
    """

    model: Model
    recipe: Recipe
    quantizers: Mapping[str, Quantizer]

    def __repr__(self) -> str:
        bits = sorted({spec.bits for spec in self.recipe.sites.values()})
        widths = f", {'/'.join(map(str, bits))} bits" if bits else ""
        return f"QuantizedModel({self.model!r}, recipe {self.recipe.name}: {len(self.quantizers)} sites{widths})"

    def stages(
        self,
        execution: Execution = Simulated(),  # noqa: B008 - frozen
        space: Space = Space(),  # noqa: B008 - frozen
    ) -> tuple[Stage, ...]:
        """Makes the stages of the quantized forward pass.

        Args:
            execution: How it is computed: `Simulated`, `Differentiable`, `Unrounded`.
            space: What forms the candidates, a dictionary of Free by the site's local name for each stage.

        Returns:
            All stages in order.

        Raises:
            InputError: A site of the space is not quantized, or the arithmetic cannot be computed here.

        Example:
            >>> weights = [site.name for site in sites_of(model.architecture) if site.role == "weight"]
            >>> stages = quantized.stages(Simulated(), Space(weights, offsets=True))
            >>> logits = forward(stages, images).logits
        """
        return tuple(self._stages(execution, space, stage_graphs(self.model.architecture)))

    def stage(
        self,
        name: str,
        execution: Execution = Simulated(),  # noqa: B008 - frozen
        space: Space = Space(),  # noqa: B008 - frozen
    ) -> Stage:
        """Makes one stage, without building the others.

        Args:
            name: The stage's name, such as "blocks.3".
            execution: See `stages`.
            space: See `stages`.

        Returns:
            The stage.

        Raises:
            InputError: As `stages` does, and for a name that no stage has.
        """
        _graph(self.model.architecture, name)
        return self._stages(execution, space, (name,))[0]

    def _stages(self, execution: Execution, space: Space, names: Any) -> list[Stage]:
        for site in space.sites:
            if site not in self.quantizers:
                raise InputError(f"the space has {site}, which is not quantized{did_you_mean(site, self.quantizers)}")
        operations = execution.operations(self.model.architecture, self.recipe, self.quantizers.values())
        stages = []
        for name in names:
            parts = self.parts(name, space)
            searched = (site for site in parts.searched if site in parts.layers) if space.offsets else ()
            biases = {site: bias for site in searched if (bias := parts.bias(site)) is not None}
            if space.rounding:
                parts = parts.with_roundings()
            function = ModelStageFunction(_graph(self.model.architecture, name), operations)
            binding = Binding(tuple((site, parts.layers[site]) for site in biases))
            state = execution.state(parts) | {"biases": biases}
            stages.append(Stage(name, function, state, parts.candidate(space, biases), binding, move_candidate))
        return stages

    def parts(self, name: str, space: Space = Space()) -> StageParts:  # noqa: B008 - frozen
        """Gathers the parts of a stage: its weights, quantizers and specifications.

        Args:
            name: The stage's name.
            space: Which sites are searched.

        Returns:
            The parts, by the sites' local names.
        """
        sites = stage_sites(self.model.architecture)[name]
        own = {local: site for local, site in sites.items() if site.name in self.quantizers}
        return StageParts(
            self.model.weights[name],
            {local: self.quantizers[site.name] for local, site in own.items()},
            {local: self.recipe.sites[site.name] for local, site in own.items()},
            {local: path_of(site) for local, site in own.items() if site.role == "weight"},
            tuple(local for local, site in own.items() if site.name in space.sites),
        )

    def with_parts(self, name: str, weights: Any, quantizers: Mapping[str, Quantizer]) -> "QuantizedModel":
        """Replaces the weights and quantizers of one stage.

        Args:
            name: The stage's name.
            weights: The stage's nested arrays.
            quantizers: The quantizers that change, by the sites' local names.

        Returns:
            The model with these parts.
        """
        sites = stage_sites(self.model.architecture)[name]
        model = replace(self.model, weights={**self.model.weights, name: weights})
        changed = {sites[local].name: quantizer for local, quantizer in quantizers.items()}
        return replace(self, model=model, quantizers={**self.quantizers, **changed})

    def with_candidates(self, candidates: Mapping[str, Mapping[str, Free]]) -> "QuantizedModel":
        """Places candidates in the model.

        Args:
            candidates: The values to place, by stage and by the sites' local names. `Free.bias` moves the present bias.

        Returns:
            A model whose stages compute what the present ones do with these candidates bound.

        Raises:
            InputError: The model lacks a stage or a site.
        """
        model = self
        for name, candidate in candidates.items():
            _graph(self.model.architecture, name)
            parts = model.parts(name)
            for site in candidate:
                if site not in parts.quantizers:
                    raise InputError(f"stage {name} has no quantized site {site}{did_you_mean(site, parts.quantizers)}")
            model = model.with_parts(name, *place_candidate(parts, candidate))
        return model


def _graph(architecture: Architecture, name: str) -> Any:
    """Finds the static part of a stage's module.

    Returns:
        The graph definition.

    Raises:
        InputError: No stage has this name.
    """
    graphs = stage_graphs(architecture)
    if name not in graphs:
        raise InputError(f"{architecture.name} has no stage {name}{did_you_mean(name, graphs)}")
    return graphs[name]
