"""The command `cptv`. A command's module, and what it imports, is imported when the command is given."""

import io
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from importlib import import_module
from typing import NoReturn

from cptv_jax.cli.parser import COMPILATION_CACHE, PLUGIN, Parser, value_of
from cptv_jax.errors import InputError, did_you_mean

EXIT_DIFFERENT, EXIT_BAD_INPUT, EXIT_INTERRUPTED = 1, 2, 130

COMMANDS = {
    "demo": "Train a small ViT on scikit-learn's digits, quantize it at 3 bits, improve it, report.",
    "import": "Convert timm weights to an Orbax checkpoint.",
    "quantize": "Quantize a model and improve it.",
    "evaluate": "Accuracy of a run or a model on labelled images.",
    "configs": "List the configurations that come with the package, for --config NAME.",
    "report": "Print a run's report.",
    "bench": "Many runs and the table that compares them.",
    "compare": "Hold this library against results of PyTorch code in the interchange format.",
}
_MODULES = {"import": "importing"}
_COMPUTING = ("demo", "quantize", "evaluate", "bench", "compare")


def _overview() -> Parser:
    parser = Parser(prog="cptv", description="Quantize Vision Transformers in JAX and improve them with CPT-V.")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for name, summary in COMMANDS.items():
        commands.add_parser(name, help=summary)
    return parser


def run(words: Sequence[str]) -> int:
    """Runs one command.

    Args:
        words: The command and its arguments.

    Returns:
        The exit code.

    Raises:
        InputError: If the usage is wrong, or the command cannot work with its input.
    """
    if not words or words[0].startswith("-"):
        _overview().parse_args(words)
    name, *rest = words
    if name not in COMMANDS:
        raise InputError(f"unknown command '{name}'{did_you_mean(name, COMMANDS)} (see cptv --help)")
    if name in _COMPUTING:
        _prepare(value_of(rest, COMPILATION_CACHE), value_of(rest, PLUGIN))
    module = import_module(f"cptv_jax.cli.{_MODULES.get(name, name)}")
    code: int = module.run(rest, f"cptv {name}", COMMANDS[name])
    return code


def _prepare(compilation_cache: str | None, plugins: str | None) -> None:
    """Sets up JAX for a command that computes, before JAX starts, and imports the user's modules."""
    from cptv_jax.runtime.compilation_cache import use_compilation_cache

    use_compilation_cache(compilation_cache)  # before JAX is imported
    from cptv_jax.runtime.mesh import use_all_cores

    with suppress(InputError):  # a program that calls main() may have started JAX as it likes
        use_all_cores()
    from cptv_jax.plugins import import_plugins

    import_plugins(plugins)


def _complain(message: str) -> None:
    print(f"cptv: {' '.join(message.splitlines())}", file=sys.stderr)


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Runs one command; exits 0, 1 (compare: beyond tolerance), 2 (bad input) or 130 (interrupted).

    Args:
        argv: The command and its arguments; None takes the process's own.

    Raises:
        OSError: If an operation fails for a reason that the operating system does not number.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):  # a path that is not UTF-8 is shown with escapes
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        code = run(sys.argv[1:] if argv is None else argv)
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
