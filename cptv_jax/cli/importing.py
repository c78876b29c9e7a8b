"""`cptv import`."""

from collections.abc import Sequence
from pathlib import Path

from cptv_jax.cli.parser import Parser
from cptv_jax.storage.models import load_float_model, save_model


def run(words: Sequence[str], prog: str, summary: str) -> int:
    """Converts timm weights to a checkpoint.

    Args:
        words: The arguments of the command.
        prog: The command, for messages.
        summary: Its purpose, for the help.

    Returns:
        The exit code.
    """
    parser = Parser(prog=prog, description=summary)
    parser.add_argument("source", help=".safetensors, .npz or .pth file, or hub:ORG/NAME")
    parser.add_argument("--arch", help="timm name, where the file's name does not contain it")
    parser.add_argument("--out", required=True, help="checkpoint directory to create")
    args = parser.parse_args(words)
    model = load_float_model(args.source, args.arch)
    save_model(Path(args.out), model)
    print(f"{args.out}: {model.architecture.name} from {model.source} (sha256 {model.sha256[:16]}...)")
    return 0
