"""`cptv bench search`: strategies, objectives and budgets at several widths, on one base method, in one table."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

from cptv_jax.bench.harness import AUTO_SEEDS, Line, Run, Source, Table, opened, refuse_set, with_bits
from cptv_jax.bench.table import Cell, rows_of
from cptv_jax.config.loading import load_config, read_config
from cptv_jax.config.schema import QuantizeConfig, SearchConfig
from cptv_jax.errors import InputError, did_you_mean
from cptv_jax.options import fields_of, to_mapping
from cptv_jax.search import STRATEGIES, NoSearch, Objective

DEFAULT_SEARCHES = ("evol-q", "generational", "guided")  # what needs no optional package
DEFAULT_BITS = ("W4A8", "W3A8")
DEFAULT_PASSES = (1, 2, 4)
_HEADER = (
    "bits", "search", "evaluations", "gradient steps", "seconds", "top-1 %", "gain", "infoNCE", "KL", "seeds", "remark",
)  # fmt: skip


@dataclass(frozen=True)
class SearchOptions:
    """The options of `cptv bench search`.

    Attributes:
        source: The inputs of all runs.
        out: The bench's directory.
        searches: Names of strategies, with their default settings, or YAML files whose search section counts; either
            may set its passes, behind a colon or in the file.
        bits: Widths such as W3A8.
        passes: The budgets of the searches that do not set their passes.
        seeds: The seeds.
        config: Base method, recipe and calibration of all runs.
        objectives: Objectives such as "kl" or "kl+cosine@features" (see Objective; without @ on the outputs that the
            search compares), or "infonce/kl", where the first is differentiated and the second decides; none means the
            search's own.
    """

    source: Source
    out: Path
    searches: tuple[str, ...] = DEFAULT_SEARCHES
    bits: tuple[str, ...] = DEFAULT_BITS
    passes: tuple[int, ...] = DEFAULT_PASSES
    seeds: tuple[int, ...] = AUTO_SEEDS
    config: QuantizeConfig = QuantizeConfig()  # noqa: RUF009 - frozen
    objectives: tuple[str, ...] = ()


def _budget(word: str) -> tuple[str, int | None]:
    """A word of --searches without its own number of passes, and that number."""
    name, colon, number = word.rpartition(":")
    return (name, int(number)) if colon and number.isdecimal() else (word, None)


def _search(word: str) -> tuple[str, SearchConfig, int | None]:
    """The label and the search that a word names, and the passes that its file asks for."""
    if word.endswith((".yaml", ".yml")):
        search = load_config(word).search
        said = read_config(word).get("search", {}).get("strategy")
        own = search.strategy.passes if isinstance(said, Mapping) and "passes" in said else None
        return Path(word).stem, search, own
    known = [name for name in STRATEGIES if name != NoSearch.name]
    if word not in known:
        raise InputError(f"--searches has '{word}'{did_you_mean(word, known)}")
    return word, SearchConfig(strategy=STRATEGIES[word]()), None


def _with_objective(label: str, search: SearchConfig, word: str) -> tuple[str, SearchConfig]:
    """The label and the search with the objective that a word of --objectives names. Raises InputError."""
    names, _, on = word.partition("@")
    proposing, _, deciding = names.rpartition("/")
    of = partial(Objective, on=on or search.judge.on, temperature=search.judge.temperature)  # type: ignore[arg-type]
    judge, strategy = of(deciding), search.strategy
    if "objective" in (field.name for field in fields_of(cast(Any, type(strategy)))):
        strategy = replace(strategy, objective=of(proposing).name if proposing else None)
    elif proposing:
        raise InputError(
            f"--objectives has '{word}', but {strategy.name} differentiates nothing; leave out {proposing}/"
        )
    judged = replace(search.judge, objective=judge.name, on=judge.on)
    return f"{label}, {word}", replace(search, judge=judged, strategy=strategy)


def _searches(options: SearchOptions) -> list[tuple[str, SearchConfig]]:
    """Labels and settings of the searches, at every budget."""
    found = []
    for word in dict.fromkeys(options.searches):
        name, own = _budget(word)
        label, search, of_file = _search(name)
        own = of_file if own is None else own
        budgets = tuple(dict.fromkeys(options.passes)) if own is None else (own,)
        if min(budgets) < 1:
            raise InputError(f"a search of {min(budgets)} passes is asked for; give 1 or more")
        variants = [_with_objective(label, search, word) for word in dict.fromkeys(options.objectives)]
        for name, variant in variants or [(label, search)]:
            for passes in budgets:
                strategy = replace(variant.strategy, passes=passes)
                found.append((f"{name}, {passes} pass{'es' * (passes > 1)}", replace(variant, strategy=strategy)))
    return found


def _runs(options: SearchOptions, seed: int) -> list[Run]:
    """The runs of one seed, by width, strategy, objective and budget."""
    refuse_set(options.config, {"search": "searches", "seed": "seeds"})
    runs = []
    for bits in dict.fromkeys(options.bits):
        config = with_bits(replace(options.config, seed=seed), bits)
        runs += [Run(bits, label, replace(config, search=search)) for label, search in _searches(options)]
    return runs


def lines_of(cells: Sequence[Cell]) -> list[Line]:
    """Turns cells into the table's lines: for each width the base, then every search with the values of its seeds.

    Args:
        cells: The cells.

    Returns:
        The lines, as plain data.
    """
    lines: list[Line] = []
    for bits in dict.fromkeys(cell.bits for cell in cells):
        here = [cell for cell in cells if cell.bits == bits]
        bases = {cell.seed: cell.measured for cell in here if cell.done}
        lines.append(_line(bits, "base", list(bases), list(bases.values()), "base", ""))
        for label in dict.fromkeys(cell.label for cell in here):
            group = [cell for cell in here if cell.label == label]
            done = [cell for cell in group if cell.done]
            remark = "; ".join(f"seed {cell.seed}: {cell.reason}" for cell in group if cell.reason)
            lines.append(_line(bits, label, [c.seed for c in done], [c.measured for c in done], "final", remark))
    return lines


def _line(bits: str, label: str, seeds: list[int], found: list[Line], stage: str, remark: str) -> Line:
    phase = "base" if stage == "base" else "search"
    top1 = [one["accuracy"][stage]["top1"] for one in found]
    return {
        "bits": bits,
        "search": label,
        "seeds": seeds,
        "evaluations": [one["evaluations"] if stage == "final" else 0 for one in found],
        "gradient_steps": [one["gradient_steps"] if stage == "final" else 0 for one in found],
        "seconds": [one["phases"].get(phase, {}).get("seconds") for one in found],
        "resumed": any(one["phases"].get(phase, {}).get("resumed", False) for one in found),
        "top1": top1,
        "gain": [after - one["accuracy"]["base"]["top1"] for after, one in zip(top1, found, strict=True)],
        "objective": [one["objective"].get(stage) for one in found],
        "kl": [one.get("kl", {}).get(stage) for one in found],
        "remark": remark,
    }


def _mean(values: Sequence[float | None], digits: int) -> str:
    """The mean, and the standard deviation where there are several."""
    known = [value for value in values if value is not None]
    if not known:
        return ""
    mean = f"{statistics.fmean(known):.{digits}f}"
    return mean if len(known) == 1 else f"{mean} ± {statistics.stdev(known):.{digits}f}"


def markdown(lines: Sequence[Line]) -> str:
    """Formats the table as Markdown, with means over seeds and their standard deviations.

    Args:
        lines: The lines that `lines_of` returns.

    Returns:
        The table.
    """
    return rows_of(
        _HEADER,
        [
            (
                line["bits"],
                line["search"],
                _mean(line["evaluations"], 0) if line["search"] != "base" else "",
                _mean(line["gradient_steps"], 0) if any(line["gradient_steps"]) else "",
                ("at least " if line["resumed"] else "") + _mean(line["seconds"], 0),
                _mean(line["top1"], 2),
                _mean(line["gain"], 2) if line["search"] != "base" else "",
                _mean(line["objective"], 4),
                _mean(line["kl"], 4),
                " ".join(map(str, line["seeds"])),
                line["remark"],
            )
            for line in lines
        ],
    )


TABLE = Table("search", lines_of, markdown)


def bench_search(options: SearchOptions, progress: bool = True) -> list[Line]:
    """Measures searches at every width and budget.

    Only missing runs are measured; search.md and search.json in `options.out` are written after each run.

    Args:
        options: The options.
        progress: Whether to show a bar.

    Returns:
        The lines of the table.

    Raises:
        InputError: If no run can use the settings, or if `out` holds something other than this bench.
    """
    first, *others = options.seeds
    runs = _runs(options, first)
    settings = {"config": to_mapping(replace(options.config, seed=0, search=SearchConfig()))}
    with opened(options.source, options.out, TABLE, settings, runs) as bench:
        bench.run(runs, progress)
        for seed in others:
            again = zip(runs, _runs(options, seed), strict=True)
            bench.run([run for before, run in again if before.name not in bench.refused], progress)
        return bench.write()
