"""Architectures: a family's code with the sizes of one model, without its weights."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import PyTree

from cptv_jax.errors import InputError, did_you_mean
from cptv_jax.interpreters import Operations, Tensor, list_sites
from cptv_jax.models.family import FAMILIES, Family
from cptv_jax.models.preprocessing import Preprocessing
from cptv_jax.recipe.sites import Site, full_name

Weights = dict[str, PyTree]
"""Weights of a model: by stage name, the nested dictionary of the stage's arrays."""


@dataclass(frozen=True)
class Architecture:
    """A model without its weights.

    Attributes:
        name: timm's name, for the models of the zoo; any other name for a user's own model.
        family: The kind of model.
        config: Its sizes, an instance of the family's configuration.
        preprocessing: What its images must look like.

    Raises:
        InputError: If the family is not a Family, or the sizes are another family's.

    Example:
        >>> from cptv_jax.models.vit_family import VIT, ViTConfig
        >>> small = Architecture("my_vit", VIT, ViTConfig(depth=2), Preprocessing())
        >>> small.stage_names
        ('embed', 'blocks.0', 'blocks.1', 'head')
    """

    name: str
    family: Family
    config: Any
    preprocessing: Preprocessing

    def __post_init__(self) -> None:
        if not isinstance(self.family, Family):
            raise InputError(
                f"{self.name}: family is {self.family!r}, but must be a Family, such as those in "
                f"FAMILIES{did_you_mean(str(self.family), FAMILIES)}"
            )
        if not isinstance(self.config, self.family.config):
            raise InputError(
                f"{self.name}: its sizes are a {type(self.config).__name__}, but the models of family "
                f"{self.family.name} have a {self.family.config.__name__}"
            )

    @property
    def stage_names(self) -> tuple[str, ...]:
        """The names of the stages, in the order they run."""
        return tuple(stage_graphs(self))

    def initialize(self, seed: int) -> Weights:
        """Draws random weights, for training from scratch.

        Args:
            seed: Seed of the random numbers.

        Returns:
            By stage, the arrays of its module, float32.
        """
        module = self.family.module(self.config, rngs=nnx.Rngs(seed))
        return {name: nnx.to_pure_dict(nnx.split(stage)[1]) for name, stage in module.stages().items()}


@lru_cache(maxsize=16)
def _abstract_stages(architecture: Architecture) -> dict[str, tuple[nnx.GraphDef[Any], PyTree]]:
    family = architecture.family
    module = nnx.eval_shape(lambda: family.module(architecture.config, rngs=nnx.Rngs(0)))
    split = {name: nnx.split(stage) for name, stage in module.stages().items()}
    return {name: (graph, nnx.to_pure_dict(state)) for name, (graph, state) in split.items()}


def stage_graphs(architecture: Architecture) -> dict[str, nnx.GraphDef[Any]]:
    """Builds the static part of each stage's NNX module.

    Args:
        architecture: The model's architecture.

    Returns:
        By stage, in the order they run. Stages that are built alike have equal graphs.
    """
    return {name: graph for name, (graph, _) in _abstract_stages(architecture).items()}


def abstract_weights(architecture: Architecture) -> Weights:
    """Computes the shapes and dtypes of an architecture's weights.

    Args:
        architecture: The model's architecture.

    Returns:
        By stage, a `jax.ShapeDtypeStruct` for each array of its module.
    """
    return {name: state for name, (_, state) in _abstract_stages(architecture).items()}


def call_stage(graph: nnx.GraphDef[Any], ops: Operations, weights: PyTree, x: Any) -> Any:
    """Runs a stage's module with an interpreter.

    Args:
        graph: The static part of the module.
        ops: The interpreter.
        weights: The arrays of the module.
        x: Its input: the images, or the output of the stage before it.

    Returns:
        Its output.
    """
    return nnx.merge(graph, weights)(ops, x)


@lru_cache(maxsize=16)
def sites_of(architecture: Architecture) -> tuple[Site, ...]:
    """Finds every site of an architecture, by tracing its forward pass.

    Args:
        architecture: The model's architecture.

    Returns:
        The sites in the order that the forward pass reaches them; the image's site has the kind "image".

    Raises:
        InputError: If the family's image site does not exist, or the site of a linear layer is not the layer's path.
    """
    preprocessing, family = architecture.preprocessing, architecture.family
    size = preprocessing.image_size
    x: Any = Tensor(jax.ShapeDtypeStruct((1, size, size, len(preprocessing.mean)), jnp.float32))  # type: ignore[arg-type]
    found: list[Site] = []
    for name, (graph, weights) in _abstract_stages(architecture).items():

        def forward(ops: Operations, weights: PyTree, x: Any, graph: Any = graph) -> Any:
            return call_stage(graph, ops, weights, x)

        sites, x = list_sites(forward, name, weights, x)
        kernels = _layers_with_kernels(weights)
        for site in sites:
            if site.role == "weight" and site.layer not in kernels:
                raise InputError(
                    f"family {family.name}: stage {name} has no kernel at '{site.layer}', the site of a linear "
                    f"layer{did_you_mean(site.layer, kernels)}; name the site after the layer's path in the module"
                )
        found.extend(sites)
    if family.image_site and family.image_site not in {site.name for site in found}:
        raise InputError(
            f"family {family.name}: image_site is '{family.image_site}', which is not a site of {architecture.name}"
            f"{did_you_mean(family.image_site, [site.name for site in found])}"
        )
    return tuple(replace(site, kind="image") if site.name == family.image_site else site for site in found)


@lru_cache(maxsize=16)
def site_table(architecture: Architecture) -> Mapping[str, Site]:
    """Tabulates the sites of an architecture by name.

    Args:
        architecture: The model's architecture.

    Returns:
        A read-only table, in the order that the forward pass reaches the sites.
    """
    return MappingProxyType({site.name: site for site in sites_of(architecture)})


def _layers_with_kernels(node: Any, path: str = "") -> set[str]:
    """Returns the dotted paths of the layers in a stage's weights that have a kernel."""
    found = {path} if "kernel" in node else set()
    for name, inner in node.items():
        if isinstance(inner, Mapping):
            found |= _layers_with_kernels(inner, full_name(path, name) if path else str(name))
    return found
