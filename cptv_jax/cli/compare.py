"""`cptv compare`."""

from collections.abc import Sequence

from cptv_jax import compare
from cptv_jax.cli.parser import Parser
from cptv_jax.runtime.mesh import use_all_cores


def run(words: Sequence[str], prog: str, summary: str) -> int:
    """Runs the command; see cptv_jax.cli.main.run."""
    parser = Parser(prog=prog, description=summary)
    parser.add_argument("files", nargs="+", metavar="FILE", help="result files (.npz)")
    args = parser.parse_args(words)
    use_all_cores()
    return compare.run(args.files)
