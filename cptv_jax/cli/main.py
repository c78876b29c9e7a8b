"""The command `cptv`."""

import argparse
import io
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

from cptv_jax.cli.bench import add_benches, add_compilation_cache
from cptv_jax.errors import InputError, did_you_mean

EXIT_DIFFERENT, EXIT_BAD_INPUT, EXIT_INTERRUPTED = 1, 2, 130


class _Parser(argparse.ArgumentParser):
    """Reports bad usage like any other bad input, and knows no abbreviations."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message} (see {self.prog} --help)")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        # First of all: the value of an unknown option would be taken for a file.
        if self._subparsers is None:
            known = self._option_string_actions
            for word in args:
                option = word.partition("=")[0]
                if option.startswith("--") and option != "--" and option not in known:
                    raise InputError(f"unknown option {option}{did_you_mean(option, known)}")
        return super().parse_known_args(args, namespace)


def _parser(command_given: str) -> argparse.ArgumentParser:
    """The whole command line, with what takes long to import only for the command that was given."""
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
    quantize.add_argument("model", help="checkpoint, timm weight file or hub:ORG/NAME")
    quantize.add_argument("--arch", help="timm name, where the file's name does not contain it")
    quantize.add_argument(
        "--images", required=True, help="calibration images: folder, tfds:NAME:SPLIT or synthetic:KIND"
    )
    quantize.add_argument("--config", help="YAML file, or the name of a shipped one (see cptv configs)")
    quantize.add_argument("--eval", dest="evaluation", help="labelled images, only evaluated on at the end")
    quantize.add_argument("--out", required=True, help="run directory; an interrupted run there is continued")

    if command_given == "quantize":
        _add_fields(quantize)

    evaluate = command("evaluate", "Accuracy of a run or a model on labelled images.")
    evaluate.add_argument("model", help="run directory, checkpoint, timm weight file or hub:ORG/NAME")
    evaluate.add_argument("--arch", help="timm name, where the file's name does not contain it")
    evaluate.add_argument("--images", required=True, help="labelled images: a folder or tfds:NAME:SPLIT")
    evaluate.add_argument("--limit", type=int, help="use so many images, chosen by seed 0")

    command("configs", "List the configurations that come with the package, for --config NAME.")

    report = command("report", "Print a run's report.")
    report.add_argument("run", help="run directory")

    add_benches(command("bench", "Many runs and the table that compares them."))

    compare = command("compare", "Hold this library against results of PyTorch code in the interchange format.")
    compare.add_argument("files", nargs="+", metavar="FILE", help="result files (.npz)")
    for computing in (demo, quantize, evaluate, compare):
        add_compilation_cache(computing)
    return parser


def _add_fields(quantize: argparse.ArgumentParser) -> None:
    from cptv_jax.config.schema import QuantizeConfig, flatten

    fields = quantize.add_argument_group("fields of the configuration", "They win over the file; values are YAML.")
    for name, default in flatten(QuantizeConfig()).items():
        shown = "null" if default is None else str(default).replace("%", "%%")
        fields.add_argument(f"--{name}", metavar="VALUE", default=argparse.SUPPRESS, help=f"default: {shown}")


def _import(args: argparse.Namespace) -> int:
    from cptv_jax.storage.models import load_float_model, save_model

    model = load_float_model(args.source, args.arch)
    save_model(Path(args.out), model)
    print(f"{args.out}: {model.architecture.name} from {model.source} (sha256 {model.sha256[:16]}...)")
    return 0


def _quantize(args: argparse.Namespace) -> int:
    from cptv_jax import data
    from cptv_jax.config.loading import load_config, override
    from cptv_jax.config.schema import QuantizeConfig, check, flatten
    from cptv_jax.evaluation import check_labels, check_unseen
    from cptv_jax.pipeline.quantize import quantize
    from cptv_jax.storage.files import refuse_foreign
    from cptv_jax.storage.models import load_float_model

    given = vars(args)
    config = override(
        load_config(args.config), {name: given[name] for name in flatten(QuantizeConfig()) if name in given}
    )
    check(config)
    refuse_foreign(Path(args.out))  # before a thousand images are decoded
    model = load_float_model(args.model, args.arch)
    preprocessing = model.architecture.preprocessing
    wanted = config.calibration.images
    images = data.load(args.images, preprocessing, labels=False, limit=wanted, need=wanted, seed=config.seed)
    evaluation = data.load(args.evaluation, preprocessing, labels=True) if args.evaluation is not None else None
    if evaluation is not None:
        check_labels(model.stages(), evaluation)  # before the hours of work
        check_unseen(evaluation, images)
    outcome = quantize(model, images, config, out=args.out, evaluation=evaluation, progress=True)
    _print_outcome(outcome, Path(args.out))
    return 0


def _print_outcome(outcome: Any, out: Path) -> None:
    for name, label in (("float", "full precision"), ("base", "base method"), ("final", "after the search")):
        if name in outcome.results:
            result = outcome.results[name]
            print(f"{label:17s} top-1 {result['top1']:6.2f} %   top-5 {result['top5']:6.2f} %")
    passes = [record for record in outcome.log if record["event"] in ("start", "pass")]
    if passes:
        judged = all(record["held_out"] is not None for record in passes)
        kept = min(passes, key=lambda record: record["held_out"]) if judged else passes[-1]
        which = f"pass {kept['pass']}" if kept["event"] == "pass" else "the base, as held-out images refused the rest"
        print(f"{'objective':17s} {passes[0]['loss']:.5f} -> {kept['loss']:.5f} ({which})")
    print(f"{'report':17s} {out / 'report.md'}")


def _evaluate(args: argparse.Namespace) -> int:
    from cptv_jax import data
    from cptv_jax.evaluation import evaluate
    from cptv_jax.quantized.model import QuantizedModel
    from cptv_jax.storage.models import load_model

    model = load_model(args.model, args.arch)
    plain = model.model if isinstance(model, QuantizedModel) else model
    images = data.load(args.images, plain.architecture.preprocessing, labels=True, limit=args.limit)
    print(evaluate(model.stages(), images, progress=True))
    return 0


def _configs(args: argparse.Namespace) -> int:
    from cptv_jax.config.shipped import names, summary_of

    width = max(map(len, names()))
    for name in names():
        print(f"{name:{width}s}  {summary_of(name)}")
    return 0


def _report(args: argparse.Namespace) -> int:
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


def _demo(args: argparse.Namespace) -> int:
    from cptv_jax.demo import run_demo

    _print_outcome(run_demo(Path(args.out).absolute()), Path(args.out))
    return 0


def _bench(args: argparse.Namespace) -> int:
    from cptv_jax.cli.bench import run

    return run(args)


def _compare(args: argparse.Namespace) -> int:
    from cptv_jax.compare import run

    return run(args.files)


_COMMANDS: dict[str, Callable[[argparse.Namespace], int]] = {
    "demo": _demo,
    "import": _import,
    "quantize": _quantize,
    "evaluate": _evaluate,
    "configs": _configs,
    "report": _report,
    "bench": _bench,
    "compare": _compare,
}


def _prepare(compilation_cache: str | None) -> None:
    """What a command that computes asks of JAX, before JAX starts."""
    from cptv_jax.runtime.compilation_cache import use_compilation_cache

    use_compilation_cache(compilation_cache)  # before JAX is imported
    from cptv_jax.runtime.mesh import use_all_cores

    with suppress(InputError):  # a program that calls main() may have started JAX as it likes
        use_all_cores()


def _complain(message: str) -> None:
    print(f"cptv: {' '.join(message.splitlines())}", file=sys.stderr)


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Runs one command; exits 0, 1 (compare: beyond tolerance), 2 (bad input) or 130 (interrupted)."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # a path that is not UTF-8 is shown with escapes
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        given = list(sys.argv[1:] if argv is None else argv)
        args = _parser(given[0] if given else "").parse_args(given)
        if "compilation_cache" in args:
            _prepare(args.compilation_cache)
        code = _COMMANDS[args.command](args)
        sys.stdout.flush()
    except InputError as error:
        _complain(str(error))
        code = EXIT_BAD_INPUT
    except KeyboardInterrupt:
        _complain("interrupted; the same command continues the run")
        code = EXIT_INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    except OSError as error:  # a disk that is full, a folder without permission
        if error.errno is None:
            raise
        where = f"{error.filename}: " if error.filename else ""
        _complain(f"{where}{error.strerror}; check the path, its permissions and the space on the disk")
        code = EXIT_BAD_INPUT
    sys.exit(code)


if __name__ == "__main__":
    main()
