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

Genes = dict[str, int]  # by site, the index of a choice


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Choice:
    """What the candidate of a stage holds of one site: which of its widths, as a float32 index."""

    index: Any  # an array; of a population, with a leading axis


@dataclass(frozen=True)
class Costs:
    """What genes cost: a sum of terms, each a factor times the widths of its sites.

    Bytes have a term for every weight; bit operations one for every product, of two sites.

    widths: that a choice stands for, ascending. terms: factors, and the sites whose widths multiply them.
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
        """Those that cost something."""
        return tuple(self._by_site)

    def _sum(self, terms: list[tuple[float, tuple[str, ...]]], genes: Genes) -> float:
        return sum(factor * math.prod(self.widths[genes[site]] for site in sites) for factor, sites in terms)

    def total(self, genes: Genes) -> float:
        """The cost of all sites."""
        return self._sum(list(self.terms), genes)

    def extra(self, genes: Genes, site: str, choice: int) -> float:
        """How much more another choice at a site costs."""
        terms = self._by_site[site]
        return self._sum(terms, {**genes, site: choice}) - self._sum(terms, genes)


def sensitivities(
    evaluator: Evaluator, choices: int, on_progress: Callable[[int], None] = lambda candidates: None
) -> dict[str, np.ndarray]:
    """By site ("STAGE.NAME"), the losses [choices] of the model with that choice there and the last one elsewhere.

    All choices of a stage's sites are one population.
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
    """The choices of least summed loss within a budget, greedily: the best loss for its cost first.

    losses: by site, of every choice; a wider choice that does worse counts as the next narrower one.
    Raises InputError where the cheapest choices of all cost more than the budget.
    """
    genes = dict.fromkeys(costs.sites, 0)
    spent = costs.total(genes)
    if spent > budget:
        raise InputError(f"a budget of {budget:.0f} is below the least possible, {spent:.0f}; raise it")
    largest = np.finfo(np.float64).max  # in place of infinity, whose differences are no numbers
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
    """Genes with some sites one choice narrower and others, as many as then fit, one wider: a mutation."""
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
    """The best genes and their loss; losses: of the best after every generation."""

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
    """A (1 + children) evolution of genes within a budget, from the start of the least true loss; that is kept unless
    a child's is lower.
    """
    best, loss = min(((start, loss_of(start)) for start in starts), key=lambda found: found[1])
    losses = [loss]
    for _ in range(generations):
        parent = best
        for _ in range(children):
            child = exchange_widths(parent, costs, budget, rng, sites=int(rng.integers(1, 4)))
            if child != parent:  # at the least budget nothing can be exchanged
                value = loss_of(child)
                if value < loss:
                    best, loss = child, value
            on_child(loss)
        losses.append(loss)
    return Evolved(best, loss, tuple(losses))
