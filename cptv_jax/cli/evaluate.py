"""`cptv evaluate`."""

from collections.abc import Sequence

from cptv_jax import data
from cptv_jax.cli.parser import Parser, add_early_options
from cptv_jax.evaluation import evaluate
from cptv_jax.quantized.model import QuantizedModel
from cptv_jax.storage.models import load_model


def run(words: Sequence[str], prog: str, summary: str) -> int:
    """Evaluates a model on labelled images and prints its accuracy.

    Args:
        words: The arguments of the command.
        prog: The command, for messages.
        summary: Its purpose, for the help.

    Returns:
        The exit code.
    """
    parser = Parser(prog=prog, description=summary)
    parser.add_argument("model", help="run directory, checkpoint, timm weight file or hub:ORG/NAME")
    parser.add_argument("--arch", help="timm name, where the file's name does not contain it")
    parser.add_argument("--images", required=True, help="labelled images: a folder or tfds:NAME:SPLIT")
    parser.add_argument("--limit", type=int, help="use this many images, chosen by seed 0")
    add_early_options(parser)
    args = parser.parse_args(words)
    model = load_model(args.model, args.arch)
    plain = model.model if isinstance(model, QuantizedModel) else model
    images = data.load(args.images, plain.architecture.preprocessing, labels=True, limit=args.limit)
    print(evaluate(model.stages(), images, progress=True))
    return 0
