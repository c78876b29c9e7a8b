"""Genes under a budget: a first allocation from sensitivities, then evolution judged by the true loss."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import numpy as np

from cptv_jax.errors import InputError
from cptv_jax.search.evaluator import Evaluator

Genes = dict[str, int]  # the index of a choice, by site


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Choice:
    """What the candidate of a stage holds for one site: the chosen width.

    Attributes:
        index: Index of the width, float32; for a population, with a leading axis.
    """

    index: Any  # an array; in a population, with a leading axis


@dataclass(frozen=True)
class Costs:
    """What genes cost: a sum of terms, each a factor times the widths of its sites.

    Bytes have a term for every weight; bit operations one for every product, of two sites.

    Attributes:
        widths: The widths in bits that choices stand for, ascending.
        terms: Factors, and the sites whose widths multiply them.
    """

    widths: tuple[int, ...]
    terms: tuple[tuple[float, tuple[str, ...]], ...]

    @cached_property
    def _by_site(self) -> dict[str, list[tuple[float, tuple[str, ...]]]]:
        found: dict[str, list[tuple[float, tuple[str, ...]]]] = {}
        for factor, sites in self.terms:
            for site in dict.fromkeys(sites):
                found.setdefault(site, []).append((factor, sites))
        return found

    @property
    def sites(self) -> tuple[str, ...]:
        """The sites that cost something."""
        return tuple(self._by_site)

    def _sum(self, terms: list[tuple[float, tuple[str, ...]]], genes: Genes) -> float:
        return sum(factor * math.prod(self.widths[genes[site]] for site in sites) for factor, sites in terms)

    def total(self, genes: Genes) -> float:
        """Returns the cost of all sites.

        Args:
            genes: The choice at every site.
        """
        return self._sum(list(self.terms), genes)

    def extra(self, genes: Genes, site: str, choice: int) -> float:
        """Returns how much more another choice at a site costs.

        Args:
            genes: The present choice at every site.
            site: The site.
            choice: The other choice.
        """
        terms = self._by_site[site]
        return self._sum(terms, {**genes, site: choice}) - self._sum(terms, genes)


def sensitivities(
    evaluator: Evaluator, choices: int, on_progress: Callable[[int], None] = lambda candidates: None
) -> dict[str, np.ndarray]:
    """Measures the losses of a model with each choice at one site and the last choice everywhere else.

    All choices of a stage's sites are one population.

    Args:
        evaluator: An evaluator of the stages of `Widths`.
        choices: How many choices a site has.
        on_progress: Called with the number of candidates after every stage.

    Returns:
        The losses [choices] by site ("STAGE.NAME").
    """
    found: dict[str, np.ndarray] = {}
    for index in reversed(range(len(evaluator.stages))):
        stage = evaluator.stages[index]
        if not stage.searchable:
            continue
        names = list(stage.candidate)
        rows = {name: np.full(len(names) * choices, choices - 1, np.float32) for name in names}
        for i, name in enumerate(names):
            rows[name][i * choices : (i + 1) * choices] = np.arange(choices)
        losses = evaluator.losses(index, {name: Choice(chosen) for name, chosen in rows.items()})
        for i, name in enumerate(names):
            found[f"{stage.name}.{name}"] = losses[i * choices : (i + 1) * choices]
        on_progress(len(losses))
    return found


def allocate(losses: Mapping[str, np.ndarray], costs: Costs, budget: float) -> Genes:
    """Chooses widths of least summed loss within a budget, greedily: the largest gain for its cost first.

    Args:
        losses: The losses of every choice by site; a wider choice that does worse counts as the next narrower one.
        costs: What choices cost.
        budget: The largest cost.

    Returns:
        The choices.

    Raises:
        InputError: The cheapest choices cost more than the budget.
    """
    genes = dict.fromkeys(costs.sites, 0)
    spent = costs.total(genes)
    if spent > budget:
        raise InputError(f"a budget of {budget:.0f} is below the least possible, {spent:.0f}; raise it")
    largest = np.finfo(np.float64).max  # instead of infinity, whose differences are NaN
    falling = {site: np.minimum.accumulate(np.minimum(losses[site], largest, dtype=np.float64)) for site in genes}
    while True:
        best: tuple[float, float, str, int] | None = None
        for site, gene in genes.items():
            for wider in range(gene + 1, len(costs.widths)):
                extra = costs.extra(genes, site, wider)
                gain = (falling[site][gene] - falling[site][wider]) / extra
                if spent + extra <= budget and (best is None or gain > best[0]):
                    best = (gain, extra, site, wider)
        if best is None:
            return genes
        _, extra, site, wider = best
        spent += extra
        genes[site] = wider


def exchange_widths(genes: Genes, costs: Costs, budget: float, rng: np.random.Generator, sites: int) -> Genes:
    """Mutates genes: makes some sites one choice narrower and others, as many as then fit, one choice wider.

    Args:
        genes: The choice at every site.
        costs: What choices cost.
        budget: The largest cost.
        rng: The source of randomness.
        sites: How many sites to make narrower, at most.

    Returns:
        The mutated genes.
    """
    child = dict(genes)
    names = list(rng.permutation(list(child)))
    narrower = [name for name in names if child[name] > 0][:sites]
    for name in narrower:
        child[name] -= 1
    spent = costs.total(child)
    for name in (name for name in names if name not in narrower and child[name] + 1 < len(costs.widths)):
        extra = costs.extra(child, name, child[name] + 1)
        if spent + extra <= budget:
            child[name] += 1
            spent += extra
    return child


@dataclass(frozen=True)
class Evolved:
    """The result of an evolution of genes.

    Attributes:
        genes: The best genes.
        loss: Their loss.
        losses: The loss of the best genes at the start and after every generation.
    """

    genes: Genes
    loss: float
    losses: tuple[float, ...]


def evolve_genes(
    loss_of: Callable[[Genes], float],
    starts: Sequence[Genes],
    costs: Costs,
    budget: float,
    rng: np.random.Generator,
    generations: int,
    children: int = 4,
    on_child: Callable[[float], None] = lambda best: None,
) -> Evolved:
    """Evolves genes within a budget: a (1 + children) evolution from the start of the least true loss.

    The parent is kept unless a child's loss is lower.

    Args:
        loss_of: Returns the true loss of genes.
        starts: Genes to start from, of which the best is the first parent.
        costs: What choices cost.
        budget: The largest cost.
        rng: The source of randomness.
        generations: How many generations to evolve.
        children: Children per generation.
        on_child: Called with the least loss so far after every child.

    Returns:
        The best genes.
    """
    best, loss = min(((start, loss_of(start)) for start in starts), key=lambda found: found[1])
    losses = [loss]
    for _ in range(generations):
        parent = best
        for _ in range(children):
            child = exchange_widths(parent, costs, budget, rng, sites=int(rng.integers(1, 4)))
            if child != parent:  # with the smallest budget nothing can be exchanged
                value = loss_of(child)
                if value < loss:
                    best, loss = child, value
            on_child(loss)
        losses.append(loss)
    return Evolved(best, loss, tuple(losses))
