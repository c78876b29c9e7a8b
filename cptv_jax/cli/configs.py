"""`cptv configs`."""

from collections.abc import Sequence

from cptv_jax.cli.parser import Parser
from cptv_jax.config.shipped import names, summary_of


def run(words: Sequence[str], prog: str, summary: str) -> int:
    """Lists the shipped configurations.

    Args:
        words: The arguments of the command.
        prog: The command, for messages.
        summary: Its purpose, for the help.

    Returns:
        The exit code.
    """
    Parser(prog=prog, description=summary).parse_args(words)
    width = max(map(len, names()))
    for name in names():
        print(f"{name:{width}s}  {summary_of(name)}")
    return 0
