"""Mixed precision: quantized models that differ only in widths, as one model whose widths are genes."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from cptv_jax.errors import InputError
from cptv_jax.interpreters import ArithmeticName, quantize_weight
from cptv_jax.mixed_precision.allocation import Choice, Costs, Genes
from cptv_jax.models.architecture import sites_of
from cptv_jax.quantized.candidate import Space
from cptv_jax.quantized.execution import Simulated
from cptv_jax.quantized.layers import stage_sites
from cptv_jax.quantized.model import Model, QuantizedModel
from cptv_jax.recipe.sites import Site, list_products
from cptv_jax.recipe.spec import Recipe
from cptv_jax.runtime.stages import Stage
from cptv_jax.search import Evaluator

_FLOAT_BITS = 32


def bind_choice(state: PyTree, candidate: Mapping[str, Choice]) -> PyTree:
    """Quantizes each of a candidate's sites at the width that is chosen there.

    Args:
        state: The stage's state, with the quantizers of all widths in "choices".
        candidate: The choices by the site's local name.

    Returns:
        The state with the chosen quantizers and weights.
    """
    quantizers, weights = dict(state["quantizers"]), dict(state["quantized"])
    for site, choice in candidate.items():
        chosen = jnp.asarray(choice.index).astype(jnp.int32)
        quantizers[site] = jax.tree.map(lambda leaf, i=chosen: leaf[i], state["choices"][site])
        if site in state["searched"]:
            weights[site] = quantize_weight(quantizers[site], *state["searched"][site])
    return {**state, "quantizers": quantizers, "quantized": weights}


@dataclass(frozen=True)
class Widths:
    """Models that are alike except for the widths of some sites.

    A model has the same width at all of these sites; the models are ordered by ascending width.

    Attributes:
        models: The models.

    Raises:
        InputError: The models differ in more (a method that rewrites weights makes other ones at every width, and one
            may fit the scales of activations to those of weights), or in nothing.
    """

    models: tuple[QuantizedModel, ...]

    def __post_init__(self) -> None:
        first = self.models[0]
        for other in self.models[1:]:
            same = jax.tree.map(np.array_equal, first.model.weights, other.model.weights)
            if not all(jax.tree.leaves(same)) or self._fixed(first) != self._fixed(other):
                raise InputError(
                    f"the models of recipe {first.recipe.name} differ in more than their widths; mixed "
                    "precision needs a base method that leaves weights as they are, such as fq-vit or omse"
                )

        if not self.sites:
            raise InputError("recipe.overrides fix every width; take out those that are to be chosen")
        for name in sorted(first.quantizers.keys() - set(self.sites)):
            own, *others = (model.quantizers[name] for model in self.models)
            if not all(all(jax.tree.leaves(jax.tree.map(np.array_equal, own, other))) for other in others):
                raise InputError(
                    f"the quantizer of {name} depends on widths of other sites; mixed precision needs a base method "
                    "that fits each site by itself, such as fq-vit or omse"
                )

    @staticmethod
    def _fixed(model: QuantizedModel) -> dict[str, Any]:
        return {name: replace(spec, bits=0) for name, spec in model.recipe.sites.items()}

    @property
    def sites(self) -> tuple[str, ...]:
        """The sites whose width is free."""
        specs = [model.recipe.sites for model in self.models]
        return tuple(name for name in specs[0] if len({sites[name].bits for sites in specs}) == len(specs))

    @property
    def _free_sites(self) -> dict[str, list[Site]]:
        """The sites whose width is free, by stage."""
        free = set(self.sites)
        by_stage = stage_sites(self.models[0].model.architecture)
        return {stage: [site for site in sites.values() if site.name in free] for stage, sites in by_stage.items()}

    @property
    def bits(self) -> tuple[int, ...]:
        """The widths, ascending."""
        return tuple(model.recipe.sites[self.sites[0]].bits for model in self.models)

    def uniform(self, index: int) -> Genes:
        """Returns genes with the same width everywhere.

        Args:
            index: Index of the width.
        """
        return dict.fromkeys(self.sites, index)

    def stages(self, arithmetic: ArithmeticName | None = None) -> tuple[Stage, ...]:
        """Makes the stages of the widest model, whose candidates are choices by the site's local name.

        Args:
            arithmetic: See `Simulated`.

        Returns:
            All stages in order.
        """
        by_stage, stages = self._free_sites, []
        for stage in self.models[-1].stages(Simulated(arithmetic), Space(self.sites)):
            choices = {
                site.local: jax.tree.map(
                    lambda *leaves: jnp.stack(leaves), *(m.quantizers[site.name] for m in self.models)
                )
                for site in by_stage[stage.name]
            }
            candidate = {name: Choice(jnp.float32(len(self.models) - 1)) for name in choices}
            stages.append(
                Stage(stage.name, stage.function, {**stage.state, "choices": choices}, candidate, bind_choice)
            )
        return tuple(stages)

    def model(self, genes: Genes) -> QuantizedModel:
        """Makes the ordinary quantized model with given widths.

        Args:
            genes: Index of the width at every site.

        Returns:
            The model.
        """
        base = self.models[-1]
        sites = {site: self.models[index].recipe.sites[site] for site, index in genes.items()}
        quantizers = {site: self.models[index].quantizers[site] for site, index in genes.items()}
        recipe = replace(base.recipe, sites={**base.recipe.sites, **sites})
        return replace(base, recipe=recipe, quantizers={**base.quantizers, **quantizers})

    def bytes_of_weights(self) -> Costs:
        """Returns the costs in bytes of the codes of the weights whose width is free, packed."""
        weights = [site for sites in self._free_sites.values() for site in sites if site.role == "weight"]
        return Costs(self.bits, tuple((math.prod(site.shape) / 8, (site.name,)) for site in weights))

    def bit_operations(self) -> Costs:
        """Computes the costs in bit operations of one image.

        Every product costs its multiplications times the widths of both operands; an operand in float has 32 bits.
        Products that read no tensor of free width have no term.

        Returns:
            The costs.
        """
        model, specs, free = self.models[0], self.models[0].recipe.sites, set(self.sites)
        terms = []
        for multiplications, operands in _quantized_products(model):
            chosen = tuple(site for site in operands if site in free)
            if chosen:
                fixed = math.prod(specs[site].bits for site in operands if site not in free)
                fixed *= _FLOAT_BITS ** (2 - len(operands))
                terms.append((float(multiplications * fixed), chosen))
        return Costs(self.bits, tuple(terms))


def _quantized_products(model: QuantizedModel) -> Iterator[tuple[int, tuple[str, ...]]]:
    """Finds the products that read quantized tensors.

    Yields:
        The multiplications of a product, and the sites where its operands are quantized.
    """
    sites = sites_of(model.model.architecture)
    known, specs = {site.name: site for site in sites}, model.recipe.sites
    for product in list_products(sites):
        sources = (name if name in specs else known[name].source for name in product.operands)
        operands = tuple(name for name in sources if name in specs)
        if operands:
            yield product.multiplications, operands


def find_product_sites(model: Model, recipe: Recipe) -> tuple[str, ...]:
    """Finds the sites of a recipe that products read: weights and activations.

    Args:
        model: The float model.
        recipe: The recipe.

    Returns:
        The sites' names.
    """
    found = _quantized_products(QuantizedModel(model, recipe, {}))
    return tuple(dict.fromkeys(site for _, operands in found for site in operands))


def loss_of_genes(evaluator: Evaluator, genes: Genes) -> float:
    """Evaluates the true loss of a whole model.

    Args:
        evaluator: An evaluator of the stages of `Widths`, which have these genes afterwards.
        genes: Index of the width at every site.

    Returns:
        The loss.
    """
    last = 0
    for index, stage in enumerate(evaluator.stages):
        if stage.searchable:
            candidate = {name: Choice(jnp.float32(genes[f"{stage.name}.{name}"])) for name in stage.candidate}
            evaluator.accept(index, candidate)
            last = index
    return evaluator.loss_of(last, evaluator.stages[last].candidate)
