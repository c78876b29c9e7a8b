"""The command `cptv`."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from cptv_jax.errors import InputError

EXIT_DIFFERENT, EXIT_BAD_INPUT, EXIT_INTERRUPTED = 1, 2, 130


class _Parser(argparse.ArgumentParser):
    """Reports bad usage like any other bad input."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message} (see {self.prog} --help)")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="cptv", description="Quantize Vision Transformers in JAX and improve them with CPT-V.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, summary: str) -> argparse.ArgumentParser:
        return commands.add_parser(name, help=summary, description=summary)

    demo = command("demo", "Train a small ViT on scikit-learn's digits, quantize it at 3 bits, improve it, report.")
    demo.add_argument("--out", default="runs/demo", help="run directory (default: runs/demo)")

    importing = command("import", "Convert timm weights to an Orbax checkpoint.")
    importing.add_argument("source", help=".safetensors, .npz or .pth file, or hub:ORG/NAME")
    importing.add_argument("--arch", help="timm name, where the file's name does not contain it")
    importing.add_argument("--out", required=True, help="checkpoint directory to create")

    quantize = command("quantize", "Quantize a model and improve it; any field of the configuration is a flag too.")
    quantize.epilog = "Fields of the configuration: --search.passes 3, --recipe.weight_bits 4, --seed 1, ..."
    quantize.add_argument("model", help="checkpoint, timm weight file or hub:ORG/NAME")
    quantize.add_argument("--arch", help="timm name, where the file's name does not contain it")
    quantize.add_argument("--images", required=True, help="calibration images: a folder or tfds:NAME:SPLIT")
    quantize.add_argument("--config", help="YAML file (see configs/)")
    quantize.add_argument("--eval", dest="evaluation", help="labelled images, only evaluated on at the end")
    quantize.add_argument("--out", required=True, help="run directory; an interrupted run there is continued")

    evaluate = command("evaluate", "Accuracy of a run or a model on labelled images.")
    evaluate.add_argument("model", help="run directory, checkpoint, timm weight file or hub:ORG/NAME")
    evaluate.add_argument("--arch", help="timm name, where the file's name does not contain it")
    evaluate.add_argument("--images", required=True, help="labelled images: a folder or tfds:NAME:SPLIT")
    evaluate.add_argument("--limit", type=int, help="use so many images, chosen by seed 0")

    report = command("report", "Print a run's report.")
    report.add_argument("run", help="run directory")

    compare = command("compare", "Hold this library against results of PyTorch code in the interchange format.")
    compare.add_argument("files", nargs="+", metavar="FILE", help="result files (.npz)")
    return parser


def _overrides(words: Sequence[str]) -> dict[str, str]:
    """`--name value` and `--name=value` pairs."""
    changes: dict[str, str] = {}
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--"):
            raise InputError(f"unexpected argument '{word}'")
        name, equals, value = word[2:].partition("=")
        if not equals:
            if not rest or rest[0].startswith("--"):
                raise InputError(f"option {word} needs a value")
            value = rest.pop(0)
        changes[name] = value
    return changes


def _import(args: argparse.Namespace) -> int:
    from cptv_jax.checkpoint import load_float_model, save_model

    model = load_float_model(args.source, args.arch)
    save_model(Path(args.out), model)
    print(f"{args.out}: {model.architecture.name} from {model.source} (sha256 {model.sha256[:16]}...)")
    return 0


def _quantize(args: argparse.Namespace, overrides: dict[str, str]) -> int:
    from cptv_jax import data
    from cptv_jax.checkpoint import load_float_model
    from cptv_jax.config import check, load_config, override
    from cptv_jax.pipeline import quantize

    config = override(load_config(args.config), overrides)
    check(config)
    model = load_float_model(args.model, args.arch)
    preprocessing = model.architecture.preprocessing
    wanted = config.calibration.images
    images = data.load(args.images, preprocessing, labels=False, limit=wanted, need=wanted, seed=config.seed)
    evaluation = data.load(args.evaluation, preprocessing, labels=True) if args.evaluation else None
    outcome = quantize(model, images, config, out=args.out, evaluation=evaluation, progress=True)
    _print_outcome(outcome, Path(args.out))
    return 0


def _print_outcome(outcome: Any, out: Path) -> None:
    for name, label in (("float", "full precision"), ("base", "base method"), ("final", "after the search")):
        if name in outcome.results:
            result = outcome.results[name]
            print(f"{label:17s} top-1 {result['top1']:6.2f} %   top-5 {result['top5']:6.2f} %")
    passes = [record for record in outcome.log if record["event"] != "accepted"]
    if passes:
        print(f"{'objective':17s} {passes[0]['loss']:.5f} -> {passes[-1]['loss']:.5f}")
    print(f"{'report':17s} {out / 'report.md'}")


def _evaluate(args: argparse.Namespace) -> int:
    from cptv_jax import data
    from cptv_jax.checkpoint import load_model
    from cptv_jax.evaluation import evaluate
    from cptv_jax.quantized import QuantizedModel

    model = load_model(args.model, args.arch)
    plain = model.model if isinstance(model, QuantizedModel) else model
    images = data.load(args.images, plain.architecture.preprocessing, labels=True, limit=args.limit)
    print(evaluate(model.stages(), images, progress=True))
    return 0


def _report(args: argparse.Namespace) -> int:
    path = Path(args.run) / "report.md"
    if not path.exists():
        unfinished = (Path(args.run) / "run.json").exists()
        reason = "has not finished; run its command again" if unfinished else "is not a run directory"
        raise InputError(f"{args.run} {reason}")
    print(path.read_text(encoding="utf-8"))
    return 0


def _run(argv: Sequence[str]) -> int:
    args, rest = _parser().parse_known_args(argv)
    if args.command == "quantize":
        return _quantize(args, _overrides(rest))
    if rest:
        raise InputError(f"unexpected argument '{rest[0]}' (see cptv {args.command} --help)")
    if args.command == "demo":
        from cptv_jax.demo import run_demo

        _print_outcome(run_demo(Path(args.out)), Path(args.out))
        return 0
    if args.command == "compare":
        from cptv_jax.compare import run

        return run(args.files)
    return {"import": _import, "evaluate": _evaluate, "report": _report}[args.command](args)


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Runs one command; exits 0, 1 (compare: beyond tolerance), 2 (bad input) or 130 (interrupted)."""
    try:
        code = _run(sys.argv[1:] if argv is None else argv)
    except InputError as error:
        print(f"cptv: {error}", file=sys.stderr)
        code = EXIT_BAD_INPUT
    except KeyboardInterrupt:
        print("cptv: interrupted; the same command continues the run", file=sys.stderr)
        code = EXIT_INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    sys.exit(code)


if __name__ == "__main__":
    main()
