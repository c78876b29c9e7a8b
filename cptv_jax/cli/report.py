"""`cptv report`."""

from collections.abc import Sequence
from pathlib import Path

from cptv_jax.cli.parser import Parser
from cptv_jax.errors import InputError


def run(words: Sequence[str], prog: str, summary: str) -> int:
    """Prints the report of a run.

    Args:
        words: The arguments of the command.
        prog: The command, for messages.
        summary: Its purpose, for the help.

    Returns:
        The exit code.

    Raises:
        InputError: If the directory is not a finished run.
    """
    parser = Parser(prog=prog, description=summary)
    parser.add_argument("run", help="run directory")
    args = parser.parse_args(words)
    path = Path(args.run) / "report.md"
    if not path.exists():
        unfinished = (Path(args.run) / "run.json").exists()
        reason = (
            "is a run that has not finished; run its command again to finish it"
            if unfinished
            else "is not a run directory; give the --out of a cptv quantize"
        )
        raise InputError(f"{args.run} {reason}")
    print(path.read_text(encoding="utf-8"))
    return 0
