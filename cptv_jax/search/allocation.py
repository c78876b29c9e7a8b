"""Genes under a budget: a first allocation from sensitivities, then evolution judged by the true loss."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from cptv_jax.errors import InputError
from cptv_jax.search.evaluator import Evaluator

Genes = dict[str, int]  # by site, the index of a choice
Costs = Mapping[str, np.ndarray]  # by site, the cost of every choice, ascending


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
        population = {name: np.full(len(names) * choices, choices - 1, np.float32) for name in names}
        for i, name in enumerate(names):
            population[name][i * choices : (i + 1) * choices] = np.arange(choices)
        losses = evaluator.losses(index, population)
        for i, name in enumerate(names):
            found[f"{stage.name}.{name}"] = losses[i * choices : (i + 1) * choices]
        on_progress(len(losses))
    return found


def allocate(losses: Costs, costs: Costs, budget: float) -> Genes:
    """The choices of least summed loss within a budget, greedily: the best loss for its cost first.

    losses: by site; a wider choice that does worse counts as the next narrower one.
    Raises InputError where the cheapest choices of all cost more than the budget.
    """
    genes = dict.fromkeys(costs, 0)
    spent = sum(cost[0] for cost in costs.values())
    if spent > budget:
        raise InputError(f"a budget of {budget:.0f} is below the least possible, {spent:.0f}; raise it")
    falling = {site: np.minimum.accumulate(values) for site, values in losses.items()}
    while True:
        best: tuple[float, str, int] | None = None
        for site, gene in genes.items():
            for wider in range(gene + 1, len(costs[site])):
                extra = costs[site][wider] - costs[site][gene]
                gain = (falling[site][gene] - falling[site][wider]) / extra
                if spent + extra <= budget and (best is None or gain > best[0]):
                    best = (gain, site, wider)
        if best is None:
            return genes
        _, site, wider = best
        spent += costs[site][wider] - costs[site][genes[site]]
        genes[site] = wider


def exchanged(genes: Genes, costs: Costs, budget: float, rng: np.random.Generator, sites: int) -> Genes:
    """Genes with some sites one choice narrower and others, as many as then fit, one wider: a mutation."""
    child = dict(genes)
    names = list(rng.permutation(list(child)))
    narrower = [name for name in names if child[name] > 0][:sites]
    for name in narrower:
        child[name] -= 1
    spent = sum(costs[name][gene] for name, gene in child.items())
    for name in (name for name in names if name not in narrower):
        extra = costs[name][child[name] + 1] - costs[name][child[name]] if child[name] + 1 < len(costs[name]) else None
        if extra is not None and spent + extra <= budget:
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
    start: Genes,
    costs: Costs,
    budget: float,
    rng: np.random.Generator,
    generations: int,
    children: int = 4,
    on_child: Callable[[float], None] = lambda best: None,
) -> Evolved:
    """A (1 + children) evolution of genes within a budget; the start is kept unless a child's true loss is lower."""
    best, loss = start, loss_of(start)
    losses = [loss]
    for _ in range(generations):
        parent = best
        for _ in range(children):
            child = exchanged(parent, costs, budget, rng, sites=int(rng.integers(1, 4)))
            value = loss_of(child)
            if value < loss:
                best, loss = child, value
            on_child(loss)
        losses.append(loss)
    return Evolved(best, loss, tuple(losses))
