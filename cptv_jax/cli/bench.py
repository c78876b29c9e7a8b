"""The command line of the benches: `cptv bench NAME`."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from cptv_jax.cli.parser import Parser, add_early_options
from cptv_jax.runtime.mesh import stay_on_cpu

_OF_CHILDREN = ("methods", "search")  # benches whose work is done by processes of their own


def add_benches(parser: argparse.ArgumentParser) -> None:
    """Adds a subcommand for each bench.

    Args:
        parser: The parser of `cptv bench`.
    """
    benches = parser.add_subparsers(dest="bench", required=True, metavar="BENCH")
    summary = "Every base method at every width, without and with CPT-V on top; repeat the command to continue it."
    methods = benches.add_parser("methods", help=summary, description=summary)
    _add_source(methods)
    methods.add_argument(
        "--methods",
        nargs="+",
        default=[],
        metavar="METHOD",
        help="NAME, NAME/PRESET, either +reconstruction, or YAML files, whose widths, calibration, search and seed "
        "do not count (default: all, each with its own recipe)",
    )
    methods.add_argument("--bits", nargs="+", metavar="WxAy", help="default: W8A8 W6A6 W4A4 W3A3 W4A8 W3A8")
    methods.add_argument("--calibration", type=int, default=128, metavar="N", help="images of a run (default: 128)")
    methods.add_argument("--batch", type=int, default=32, metavar="N", help="images per batch (default: 32)")
    methods.add_argument(
        "--seeds",
        nargs="+",
        default=["0"],
        metavar="SEED",
        help="default: 0; auto: 0, and 0 1 2 for rows within 1.5 points of another",
    )
    methods.add_argument(
        "--search",
        metavar="YAML|none",
        help="the search on top, as a configuration has it (default: guided, with 60 steps)",
    )
    methods.add_argument(
        "--config", metavar="YAML", help="settings that all runs share, with options for the runs of its method"
    )

    summary = "Search strategies, objectives and budgets on one base method; repeat the command to continue it."
    search = benches.add_parser("search", help=summary, description=summary)
    _add_source(search)
    search.add_argument(
        "--searches",
        nargs="+",
        metavar="SEARCH",
        help="strategies, or YAML files with a search, either with passes of its own, as in guided:1 "
        "(default: evol-q generational guided)",
    )
    search.add_argument(
        "--objectives",
        nargs="+",
        default=[],
        metavar="OBJECTIVE",
        help="infonce, kl, mse, cosine or a sum (kl+cosine), perhaps @features or @both; infonce/kl: infonce is "
        "differentiated, kl decides (default: the search's)",
    )
    search.add_argument("--bits", nargs="+", metavar="WxAy", help="default: W4A8 W3A8")
    search.add_argument("--passes", nargs="+", type=int, metavar="N", help="the budgets (default: 1 2 4)")
    search.add_argument("--seeds", nargs="+", default=["auto"], metavar="SEED", help="default: 0 1 2")
    search.add_argument("--config", metavar="YAML", help="base method, recipe and calibration of all runs")

    summary = "Accuracy against cost: uniform widths, and mixed ones that cost no more; repeat to continue it."
    precision = benches.add_parser("precision", help=summary, description=summary)
    _add_source(precision, held_out=False)
    precision.add_argument("--bits", nargs="+", type=int, metavar="N", help="widths a site may have (default: 2 to 8)")
    precision.add_argument("--judges", type=int, default=200, metavar="N", help="images that judge (default: 200)")
    text = "generations of the evolution (default: 6)"
    precision.add_argument("--generations", type=int, default=6, metavar="N", help=text)
    precision.add_argument(
        "--children", type=int, default=4, metavar="N", help="candidates per generation (default: 4)"
    )
    text = "sites with separate widths (default: weights); all: also activations that products read"
    precision.add_argument("--genes", default="weights", metavar="WHAT", help=text)
    text = "cost in which mixed widths may equal uniform ones: bytes of the weights, or bit-operations (default: bytes)"
    precision.add_argument("--budget", default="bytes", metavar="COST", help=text)
    precision.add_argument("--config", metavar="YAML", help="base method, recipe, calibration, objective and seed")


def _add_source(parser: argparse.ArgumentParser, held_out: bool = True) -> None:
    """Adds the options that every bench has: its inputs and its directory."""
    parser.add_argument("--weights", required=True, help="checkpoint, timm weight file or hub:ORG/NAME")
    parser.add_argument("--arch", help="timm name, where the file's name does not contain it")
    parser.add_argument("--images", required=True, help="calibration images: folder, tfds:NAME:SPLIT or synthetic:KIND")
    parser.add_argument("--eval", dest="evaluation", required=True, help="labelled images, only evaluated on")
    parser.add_argument("--out", required=True, help="directory of the bench; an interrupted one is continued")
    add_early_options(parser)
    if held_out:
        text = "further images that only the objective in the table is measured on (default: 100)"
        parser.add_argument("--held-out", type=int, default=100, metavar="N", help=text)
        text = "runs at once, which then share the machine in their seconds (default: 1)"
        parser.add_argument("--jobs", type=int, default=1, metavar="N", help=text)


def run(words: Sequence[str], prog: str, summary: str) -> int:
    """Runs the chosen bench and prints its table.

    Args:
        words: The arguments of the command.
        prog: The command, for messages.
        summary: Its purpose, for the help.

    Returns:
        The exit code: 1 if no run could be measured, else 0.
    """
    parser = Parser(prog=prog, description=summary)
    add_benches(parser)
    args = parser.parse_args(words)
    if args.bench in _OF_CHILDREN:
        stay_on_cpu()
    text, measured = {"methods": _methods, "search": _search, "precision": _precision}[args.bench](args)
    print(text, end="")
    return 0 if measured else 1


def _precision(args: argparse.Namespace) -> tuple[str, bool]:
    from cptv_jax.bench.harness import Source
    from cptv_jax.bench.precision import DEFAULT_BITS, PrecisionOptions, bench_precision, markdown
    from cptv_jax.config.loading import load_config

    options = PrecisionOptions(
        Source(args.weights, args.images, args.evaluation, args.arch),
        Path(args.out),
        tuple(args.bits or DEFAULT_BITS),
        args.judges,
        args.generations,
        args.children,
        load_config(args.config),
        args.genes,
        args.budget,
    )
    return markdown(bench_precision(options)), True


def _search(args: argparse.Namespace) -> tuple[str, bool]:
    from cptv_jax.bench.harness import AUTO_SEEDS, Source, seeds_from
    from cptv_jax.bench.search import (
        DEFAULT_BITS,
        DEFAULT_PASSES,
        DEFAULT_SEARCHES,
        SearchOptions,
        bench_search,
        markdown,
    )
    from cptv_jax.config.loading import load_config

    options = SearchOptions(
        Source(args.weights, args.images, args.evaluation, args.arch, args.held_out, args.jobs),
        Path(args.out),
        tuple(args.searches or DEFAULT_SEARCHES),
        tuple(args.bits or DEFAULT_BITS),
        tuple(args.passes or DEFAULT_PASSES),
        seeds_from(args.seeds) or AUTO_SEEDS,
        load_config(args.config),
        tuple(args.objectives),
    )
    lines = bench_search(options)
    return markdown(lines), any(line["seeds"] for line in lines)


def _methods(args: argparse.Namespace) -> tuple[str, bool]:
    from cptv_jax.bench.harness import seeds_from
    from cptv_jax.bench.methods import DEFAULT_BITS, Options, bench_methods, search_from
    from cptv_jax.bench.table import markdown
    from cptv_jax.config.loading import load_config

    options = Options(
        weights=args.weights,
        images=args.images,
        evaluation=args.evaluation,
        out=Path(args.out),
        arch=args.arch,
        methods=tuple(args.methods),
        bits=tuple(args.bits or DEFAULT_BITS),
        calibration=args.calibration,
        batch=args.batch,
        held_out=args.held_out,
        seeds=seeds_from(args.seeds),
        search=search_from(args.search),
        config=load_config(args.config),
        jobs=args.jobs,
    )
    lines = bench_methods(options)
    return markdown(lines), any(line["seeds"] for line in lines)
