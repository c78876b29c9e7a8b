"""`cptv compare`."""

from collections.abc import Sequence

from cptv_jax import compare
from cptv_jax.cli.parser import Parser, add_early_options


def run(words: Sequence[str], prog: str, summary: str) -> int:
    """Compares this library with result files of PyTorch code.

    Args:
        words: The arguments of the command.
        prog: The command, for messages.
        summary: Its purpose, for the help.

    Returns:
        The exit code.
    """
    parser = Parser(prog=prog, description=summary)
    parser.add_argument("files", nargs="+", metavar="FILE", help="result files (.npz)")
    add_early_options(parser)
    args = parser.parse_args(words)
    return compare.run(args.files)
