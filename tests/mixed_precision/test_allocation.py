"""Genes under a budget: never beyond it, the best first, and only a lower true loss replaces them."""

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cptv_jax.errors import InputError
from cptv_jax.mixed_precision.allocation import Costs, allocate, evolve_genes, exchange_widths

COSTS = Costs((2, 3, 4), ((1.0, ("a",)), (10.0, ("b",)), (1.0, ("c",))))
PRODUCTS = Costs((2, 3, 4), ((1.0, ("a", "b")), (5.0, ("b", "b")), (2.0, ("b", "c")), (7.0, ("a",))))
cost_of = COSTS.total
SITES = ("a", "b", "c")
ANY_GENES = st.fixed_dictionaries({site: st.integers(0, 2) for site in SITES})


def test_costs_are_sums_of_products_of_widths() -> None:
    assert COSTS.total({"a": 0, "b": 1, "c": 2}) == 2 + 30 + 4
    assert PRODUCTS.total({"a": 0, "b": 1, "c": 2}) == 2 * 3 + 5 * 9 + 2 * 3 * 4 + 7 * 2
    assert PRODUCTS.sites == SITES


@given(ANY_GENES, st.sampled_from(SITES), st.integers(0, 2))
def test_what_a_choice_costs_more_is_the_difference_of_the_totals(genes: dict[str, int], site: str, to: int) -> None:
    for costs in (COSTS, PRODUCTS):
        assert costs.extra(genes, site, to) == costs.total({**genes, site: to}) - costs.total(genes)


@given(
    st.lists(st.lists(st.floats(0, 10), min_size=3, max_size=3), min_size=3, max_size=3),
    st.sampled_from([COSTS, PRODUCTS]),
    st.floats(46, 120),
)
@settings(max_examples=200)
def test_an_allocation_fits_its_budget_and_leaves_no_room_for_a_gain(
    losses: list[list[float]], costs: Costs, budget: float
) -> None:
    by_site = dict(zip(SITES, map(np.asarray, losses), strict=True))
    genes, cost_of = allocate(by_site, costs, budget), costs.total
    assert cost_of(genes) <= budget
    for site, gene in genes.items():
        for wider in range(gene + 1, 3):
            fits = cost_of({**genes, site: wider}) <= budget
            assert not fits or by_site[site][wider] >= by_site[site][: gene + 1].min()


def test_what_gains_most_for_its_cost_comes_first() -> None:
    losses = {"a": np.asarray([5.0, 1.0, 0.0]), "b": np.asarray([9.0, 5.0, 0.0]), "c": np.asarray([0.2, 0.1, 0.0])}
    assert allocate(losses, COSTS, 24.0) == {"a": 0, "b": 0, "c": 0}
    assert allocate(losses, COSTS, 25.0) == {"a": 1, "b": 0, "c": 0}
    assert allocate(losses, COSTS, 48.0) == {"a": 2, "b": 2, "c": 2}
    best = min(
        (
            genes
            for genes in (dict(zip(SITES, g, strict=True)) for g in product(range(3), repeat=3))
            if cost_of(genes) <= 46
        ),
        key=lambda genes: sum(losses[site][gene] for site, gene in genes.items()),
    )
    assert allocate(losses, COSTS, 46.0) == best


def test_losses_that_are_infinite_at_every_width_take_nothing_from_others() -> None:
    losses = {
        "a": np.asarray([np.inf, np.inf, np.inf]),
        "b": np.asarray([9.0, 5.0, 0.0]),
        "c": np.asarray([2.0, 1.0, 0.0]),
    }
    assert allocate(losses, COSTS, 26.0) == {"a": 0, "b": 0, "c": 2}


def test_a_budget_below_the_least_is_refused() -> None:
    with pytest.raises(InputError, match="a budget of 20 is below the least possible, 24"):
        allocate({site: np.zeros(3) for site in SITES}, COSTS, 20.0)


@given(st.integers(0, 2**31), st.integers(1, 3), st.sampled_from([COSTS, PRODUCTS]))
def test_a_mutation_keeps_to_the_budget_and_the_choices(seed: int, sites: int, costs: Costs) -> None:
    parent = {"a": 1, "b": 1, "c": 2}
    child = exchange_widths(parent, costs, costs.total(parent), np.random.default_rng(seed), sites)
    assert costs.total(child) <= costs.total(parent)
    assert all(0 <= gene <= 2 for gene in child.values())
    assert child != parent
    assert parent == {"a": 1, "b": 1, "c": 2}


def test_evolution_finds_a_better_exchange_and_never_a_worse_one() -> None:
    wanted = {"a": 2, "b": 1, "c": 0}

    def loss_of(genes: dict[str, int]) -> float:
        return float(sum(abs(genes[site] - wanted[site]) for site in genes))

    start = {"a": 0, "b": 1, "c": 2}
    found = evolve_genes(
        loss_of, [{"a": 0, "b": 0, "c": 2}, start], COSTS, cost_of(start), np.random.default_rng(0), generations=20
    )
    assert found.genes == wanted and found.loss == 0.0
    assert list(found.losses) == sorted(found.losses, reverse=True) and found.losses[0] == loss_of(start)
    stuck = evolve_genes(lambda genes: 1.0, [start], COSTS, cost_of(start), np.random.default_rng(0), generations=5)
    assert stuck.genes == start
