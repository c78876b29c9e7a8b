"""An architecture: the code and sizes of a model, without its weights."""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import PyTree

from cptv_jax.errors import InputError, did_you_mean
from cptv_jax.interpreters import Operations, Tensor, list_sites
from cptv_jax.models.preprocessing import Preprocessing
from cptv_jax.models.vit import VisionTransformer, ViTConfig
from cptv_jax.recipe.sites import Site

# Each family's sizes and module; a new architecture adds a line here.
FAMILIES: dict[str, tuple[type[Any], type[Any]]] = {"vit": (ViTConfig, VisionTransformer)}

# Weights of a model: by stage name, the nested dictionary of the stage's arrays.
Weights = dict[str, PyTree]


@dataclass(frozen=True)
class Architecture:
    """name: timm's. family: key of FAMILIES. config: sizes. preprocessing: what its images must look like."""

    name: str
    family: str
    config: Any
    preprocessing: Preprocessing

    def __post_init__(self) -> None:
        if self.family not in FAMILIES:
            raise InputError(f"unknown model family '{self.family}'{did_you_mean(self.family, FAMILIES)}")

    @property
    def stage_names(self) -> tuple[str, ...]:
        return tuple(stage_graphs(self))

    def initialize(self, seed: int) -> Weights:
        """Random weights, for training from scratch."""
        module = FAMILIES[self.family][1](self.config, rngs=nnx.Rngs(seed))
        return {name: nnx.to_pure_dict(nnx.split(stage)[1]) for name, stage in module.stages().items()}


@lru_cache(maxsize=16)
def _abstract_stages(architecture: Architecture) -> dict[str, tuple[nnx.GraphDef[Any], PyTree]]:
    module_type = FAMILIES[architecture.family][1]
    module = nnx.eval_shape(lambda: module_type(architecture.config, rngs=nnx.Rngs(0)))
    split = {name: nnx.split(stage) for name, stage in module.stages().items()}
    return {name: (graph, nnx.to_pure_dict(state)) for name, (graph, state) in split.items()}


def stage_graphs(architecture: Architecture) -> dict[str, nnx.GraphDef[Any]]:
    """By stage, in order, the static part of its NNX module; equal for stages that are built alike."""
    return {name: graph for name, (graph, _) in _abstract_stages(architecture).items()}


def abstract_weights(architecture: Architecture) -> Weights:
    """Shapes and dtypes of the architecture's weights."""
    return {name: state for name, (_, state) in _abstract_stages(architecture).items()}


def call_stage(graph: nnx.GraphDef[Any], ops: Operations, weights: PyTree, x: Any) -> Any:
    """Runs one stage's module with an interpreter."""
    return nnx.merge(graph, weights)(ops, x)


@lru_cache(maxsize=16)
def sites_of(architecture: Architecture) -> tuple[Site, ...]:
    """Every site of the architecture, in the order the forward pass reaches them."""
    preprocessing = architecture.preprocessing
    size = preprocessing.image_size
    x: Any = Tensor(jax.ShapeDtypeStruct((1, size, size, len(preprocessing.mean)), jnp.float32))  # type: ignore[arg-type]
    found: list[Site] = []
    for name, (graph, weights) in _abstract_stages(architecture).items():

        def forward(ops: Operations, weights: PyTree, x: Any, graph: Any = graph) -> Any:
            return call_stage(graph, ops, weights, x)

        sites, x = list_sites(forward, name, weights, x)
        found.extend(sites)
    return tuple(found)
