"""An argument parser that reports bad usage like any other bad input, and knows no abbreviations."""

import argparse
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from cptv_jax.errors import InputError, did_you_mean

COMPILATION_CACHE = "--compilation-cache"


class Parser(argparse.ArgumentParser):
    """A parser of one command.

    Args:
        explain: Asked about an unknown option; what it returns, if anything, is said instead of the nearest known one.
        **settings: As of argparse.ArgumentParser.
    """

    def __init__(self, explain: Callable[[str], str | None] = lambda option: None, **settings: Any) -> None:
        super().__init__(**settings, allow_abbrev=False)
        self._explain = explain

    def error(self, message: str) -> NoReturn:
        """Raises InputError with the message."""
        raise InputError(f"{message} (see {self.prog} --help)")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As of argparse; an unknown option is refused first, or its value would be taken for a file."""
        if self._subparsers is None:
            known = self._option_string_actions
            for word in args:
                option = word.partition("=")[0]
                if option.startswith("--") and option != "--" and option not in known:
                    ending = self._explain(option) or did_you_mean(option, known)
                    raise InputError(f"unknown option {option}{ending}")
        return super().parse_known_args(args, namespace)


def add_compilation_cache(parser: argparse.ArgumentParser) -> None:
    """Adds the option that every command has which computes; cptv_jax.cli.main reads it before JAX is imported.

    Args:
        parser: The command's.
    """
    parser.add_argument(
        COMPILATION_CACHE,
        metavar="DIR|off",
        help="where compiled programs are kept for the next run (default: a folder of the user's cache directory)",
    )


def value_of(words: Sequence[str], option: str) -> str | None:
    """Finds the value of an option before the command line is parsed.

    Args:
        words: The command line.
        option: Such as "--config".

    Returns:
        The last value given; None without one.
    """
    found = None
    for word, following in zip(words, [*words, None][1:], strict=True):
        if word == option:
            found = following
        elif word.startswith(f"{option}="):
            found = word.partition("=")[2]
    return found
