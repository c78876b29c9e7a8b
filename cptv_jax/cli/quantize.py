"""`cptv quantize`: a flag for every field of the configuration."""

import argparse
import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from cptv_jax import data
from cptv_jax.cli.flags import add_flags, choose, explain, flags_of, override, spell
from cptv_jax.cli.outcome import print_outcome
from cptv_jax.cli.parser import Parser, add_early_options, value_of
from cptv_jax.config.loading import load_config
from cptv_jax.config.schema import QuantizeConfig
from cptv_jax.errors import InputError
from cptv_jax.pipeline.outcome import Quantization
from cptv_jax.pipeline.quantize import quantize
from cptv_jax.storage.files import refuse_foreign
from cptv_jax.storage.models import load_float_model

_INTRODUCTION = """
Any field of the configuration is a flag. Flags win over the file of --config, whose values are then the defaults shown;
values are YAML.
"""


def _formatter(prog: str) -> argparse.HelpFormatter:
    width = min(80, shutil.get_terminal_size().columns) - 1
    return argparse.HelpFormatter(prog, max_help_position=8, width=width)


def parser_for(config: QuantizeConfig, prog: str = "cptv quantize", summary: str = "") -> Parser:
    """Builds the command's parser.

    Args:
        config: What --config and the flags that choose strategy and method give; its values are shown as defaults.
        prog: The command, for messages.
        summary: What it does.

    Returns:
        The parser.
    """
    parser = Parser(
        partial(explain, config),
        prog=prog,
        description=f"{summary} {_INTRODUCTION.strip()}",
        formatter_class=_formatter,
        usage=f"{prog} MODEL --images IMAGES --out OUT [--eval IMAGES]\n{' ' * 21}[--config YAML] [--FIELD VALUE ...]",
    )
    parser.add_argument("model", metavar="MODEL", help="checkpoint, timm weight file or hub:ORG/NAME")
    parser.add_argument("--arch", metavar="NAME", help="timm name, where the file's name does not contain it")
    parser.add_argument("--images", required=True, help="calibration images: folder, tfds:NAME:SPLIT or synthetic:KIND")
    parser.add_argument("--config", metavar="YAML", help="file, or name of a shipped configuration (see cptv configs)")
    parser.add_argument(
        "--eval", dest="evaluation", metavar="IMAGES", help="labelled images, only evaluated on at the end"
    )
    parser.add_argument("--out", required=True, help="run directory; an interrupted run there is continued")
    add_early_options(parser)
    add_flags(parser, config)
    return parser


def run(words: Sequence[str], prog: str, summary: str) -> int:
    """Quantizes a model and prints the outcome.

    Args:
        words: The arguments of the command.
        prog: The command, for messages.
        summary: Its purpose, for the help.

    Returns:
        The exit code.

    Raises:
        InputError: If the configuration, the model or the images cannot work; fields are named as flags.
    """
    start = choose(load_config(value_of(words, "--config")), words)
    args = parser_for(start, prog, summary).parse_args(words)
    flags = flags_of(start)
    config = override(start, {name: text for name, text in vars(args).items() if name in flags})
    try:
        outcome = _quantize(args, config)
    except InputError as error:
        raise InputError(spell(str(error), tuple(flags))) from None
    print_outcome(outcome, Path(args.out))
    return 0


def _quantize(args: argparse.Namespace, config: QuantizeConfig) -> Quantization:
    refuse_foreign(Path(args.out))  # before a thousand images are decoded
    model = load_float_model(args.model, args.arch)
    preprocessing = model.architecture.preprocessing
    wanted = config.calibration.images
    images = data.load(args.images, preprocessing, labels=False, limit=wanted, need=wanted, seed=config.seed)
    evaluation = data.load(args.evaluation, preprocessing, labels=True) if args.evaluation is not None else None
    return quantize(model, images, config, out=args.out, evaluation=evaluation, progress=True)
