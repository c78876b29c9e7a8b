"""`cptv configs`."""

from collections.abc import Sequence

from cptv_jax.cli.parser import Parser
from cptv_jax.config.shipped import names, summary_of


def run(words: Sequence[str], prog: str, summary: str) -> int:
    """Runs the command; see cptv_jax.cli.main.run."""
    Parser(prog=prog, description=summary).parse_args(words)
    width = max(map(len, names()))
    for name in names():
        print(f"{name:{width}s}  {summary_of(name)}")
    return 0
