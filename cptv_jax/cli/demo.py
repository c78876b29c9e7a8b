"""`cptv demo`."""

from collections.abc import Sequence
from pathlib import Path

from cptv_jax.cli.outcome import print_outcome
from cptv_jax.cli.parser import Parser, add_early_options
from cptv_jax.demo import run_demo


def run(words: Sequence[str], prog: str, summary: str) -> int:
    """Runs the demo and prints its outcome.

    Args:
        words: The arguments of the command.
        prog: The command, for messages.
        summary: Its purpose, for the help.

    Returns:
        The exit code.
    """
    parser = Parser(prog=prog, description=summary)
    parser.add_argument("--out", default="runs/demo", help="run directory (default: runs/demo)")
    add_early_options(parser)
    args = parser.parse_args(words)
    print_outcome(run_demo(Path(args.out).absolute()), Path(args.out))
    return 0
