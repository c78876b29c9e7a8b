"""The table of a bench: what stands in it, and which runs are near enough to need more seeds."""

from typing import Any

import pytest

from cptv_jax.bench.table import Cell, lines_of, markdown, near


def cell(label: str, top1: tuple[float, float], *, bits: str = "W4A8", seed: int = 0, search: str = "evol-q") -> Cell:
    measured: dict[str, Any] = {
        "done": True,
        "accuracy": {name: {"top1": value, "images": 500} for name, value in zip(("base", "final"), top1, strict=True)},
        "objective": {"base": 20.0 + seed, "final": 19.0 + seed},
        "kl": {"base": 0.5 + seed, "final": 0.25},
        "phases": {
            "base": {"seconds": 10.0 + seed, "peak_mib": 100.0 + seed, "resumed": False},
            "search": {"seconds": 30.0, "peak_mib": 300.0, "resumed": False},
        },
        "recipe": "evol-q",
        "scope": "full",
        "images": {"base": 90, "search": 90, "held_out": 10},
    }
    return Cell(bits, label, seed, search, measured)


def rows(cells: list[Cell]) -> list[dict[str, str]]:
    header, rule, *lines = markdown(lines_of(cells)).splitlines()
    names = [name.strip() for name in header.strip("|").split("|")]
    assert set(rule) == {"|", "-"} and rule.count("|") == len(names) + 1
    split = [[field.strip() for field in line.removeprefix("|").removesuffix("|").split(" |")] for line in lines]
    return [dict(zip(names, fields, strict=True)) for fields in split]


def test_a_run_with_a_search_has_a_line_without_and_a_line_with_it() -> None:
    base, search = rows([cell("fq-vit", (50.0, 51.25))])
    assert base == {
        "bits": "W4A8",
        "method": "fq-vit",
        "recipe": "evol-q",
        "what is quantized": "fully quantized",
        "CPT-V": "",
        "top-1 %": "50.00",
        "objective": "20.0000",
        "KL": "0.5000",
        "seconds": "10",
        "peak MiB": "100",
        "images": "90",
        "remark": "",
    }
    assert search["CPT-V"] == "+ evol-q" and search["top-1 %"] == "51.25" and search["objective"] == "19.0000"
    assert search["KL"] == "0.2500"
    assert search["seconds"] == "+ 30" and search["peak MiB"] == "300"
    assert search["images"] == "90 + 10 to pick a pass"


def test_without_a_search_there_is_one_line() -> None:
    [line] = rows([cell("fq-vit", (50.0, 50.0), search="none")])
    assert line["CPT-V"] == "" and line["images"] == "90"


def test_several_seeds_are_shown_as_mean_and_spread() -> None:
    base, search = rows([cell("erq", (50.0 + seed, 60.0 - seed), seed=seed) for seed in (0, 1, 5)])
    assert base["top-1 %"] == "52.00 (50.00 to 55.00) (seeds 0, 1, 5)"
    assert search["top-1 %"] == "58.00 (55.00 to 60.00) (seeds 0, 1, 5)"
    assert base["objective"] == "22.0000 (20.0000 to 25.0000)"
    assert base["seconds"] == "12" and base["peak MiB"] == "105"  # mean seconds, largest peak


def test_a_run_that_gave_nothing_says_why_and_the_others_stand() -> None:
    bad = Cell("W3A3", "ptq4vit", 0, "evol-q", {}, "failed: a | b\nc")
    lone, base, _ = rows([bad, cell("fq-vit", (50.0, 51.0))])
    assert lone["top-1 %"] == lone["seconds"] == lone["images"] == ""
    assert lone["remark"] == "failed: a \\| b c"
    assert base["top-1 %"] == "50.00"
    one_of_two = [cell("fq-vit", (50.0, 51.0)), Cell("W4A8", "fq-vit", 1, "evol-q", {}, "failed: x")]
    base, search = rows(one_of_two)
    assert base["top-1 %"] == "50.00" and base["remark"] == "seed 1: failed: x" and search["remark"] == ""


def test_seconds_of_a_resumed_search_are_a_lower_bound() -> None:
    resumed = cell("fq-vit", (50.0, 51.0))
    resumed.measured["phases"]["search"]["resumed"] = True
    base, search = rows([resumed])
    assert base["seconds"] == "10" and search["seconds"] == "+ at least 30"


def test_what_was_not_measured_is_left_empty() -> None:
    partial = cell("fq-vit", (50.0, 51.0))
    partial.measured.update({"objective": {}, "kl": {}})
    del partial.measured["phases"]["base"]  # an earlier process ended between the phase and its record
    base, _ = rows([partial])
    assert base["objective"] == base["KL"] == base["seconds"] == base["peak MiB"] == ""


@pytest.mark.parametrize(
    ("others", "expected"),
    [
        ([], {"a"}),  # its own search, half a point better
        ([cell("b", (51.9, 60.0))], {"a", "b"}),
        ([cell("b", (51.9, 60.0), bits="W8A8")], {"a"}),  # another width is no rival
        ([cell("b", (52.1, 60.0))], {"a"}),
        ([Cell("W4A8", "b", 0, "evol-q", {}, "failed")], {"a"}),
    ],
)
def test_runs_within_so_many_points_of_another_line_are_near(others: list[Cell], expected: set[str]) -> None:
    found = near([cell("a", (50.0, 50.5)), *others], 1.5)
    assert {one.label for one in found} == expected
    assert near([cell("a", (50.0, 55.0)), cell("b", (40.0, 60.0), search="none")], 1.5) == []
