"""Families: kinds of model, each with everything that the library needs to know about it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from flax import nnx

from cptv_jax.models.weight_table import Entry
from cptv_jax.registry import Registry


class StagedModule(Protocol):
    """An NNX module that is cut into stages."""

    def stages(self) -> Mapping[str, nnx.Module]:
        """Lists the stages by name, in the order they run.

        A stage is called as stage(operations, x). The first gets the images, a Tensor [batch, height, width, channels];
        each other one gets the output of the stage before it; the last returns an Output.

        Returns:
            The stages.
        """


@dataclass(frozen=True)
class Family:
    """A kind of model: its code, and everything that the library needs to know about it.

    A user's own family needs nothing from inside the package: modules that call `Operations`, a configuration, and
    this record. `register_family` lets saved models find it again.

    Attributes:
        name: The name that checkpoints store.
        config: The frozen dataclass of a model's sizes; its fields are numbers, texts, truth values or tuples of them.
        module: Builds a model as module(config, rngs=nnx.Rngs(seed)). The site of each linear layer and LayerNorm must
            be its path in the stage's module, and no two operations of a stage may share a site.
        weight_table: From a configuration, an entry for every array of the model. It serves only to read files of
            weights; an empty table is enough for a model whose weights come from elsewhere.
        searched_sites: Patterns of the weight sites that the published search moves.
        image_site: The site of the input image ("embed.input"), or "" if the model does not make it one; recipes can
            give the image a width of its own or leave it in float.

    Example:
        >>> MIXER = register_family(Family("mixer", MixerConfig, Mixer, mixer_table, image_site="stem.image"))
        >>> architecture = Architecture("mixer_s", MIXER, MixerConfig(width=64), Preprocessing(image_size=32))
        >>> model = Model(architecture, architecture.initialize(seed=0))
    """

    name: str
    config: type[Any]
    module: Callable[..., StagedModule]
    weight_table: Callable[[Any], Sequence[Entry]]
    searched_sites: tuple[str, ...] = ("*.weight",)
    image_site: str = ""

    def __repr__(self) -> str:
        return f"Family({self.name!r})"


FAMILIES: Registry[Family] = Registry("model family")


def register_family(family: Family) -> Family:
    """Makes a family known by its name, so that saved models of it can be loaded.

    Args:
        family: The family; code that loads a model must have registered it too.

    Returns:
        The same family.

    Raises:
        InputError: If another family has this name.

    Example:
        >>> MIXER = register_family(Family("mixer", MixerConfig, Mixer, mixer_table))
    """
    return FAMILIES.register(family.name, family)
