"""An argument parser that reports bad usage like any other bad input, and knows no abbreviations."""

import argparse
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from cptv_jax.errors import InputError, did_you_mean

COMPILATION_CACHE, PLUGIN = "--compilation-cache", "--plugin"


class Parser(argparse.ArgumentParser):
    """A parser of one command.

    Args:
        explain: Called with an unknown option; the text that it returns, if any, replaces the hint at the nearest known
            one.
        **settings: Settings of argparse.ArgumentParser.
    """

    def __init__(self, explain: Callable[[str], str | None] = lambda option: None, **settings: Any) -> None:
        super().__init__(**settings, allow_abbrev=False)
        self._explain = explain

    def error(self, message: str) -> NoReturn:
        """Reports bad usage.

        Args:
            message: The complaint of argparse.

        Raises:
            InputError: Always, with the message.
        """
        raise InputError(f"{message} (see {self.prog} --help)")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parses as argparse does, but refuses an unknown option first: its value would be taken for a file.

        Args:
            args: The words of the command line.
            namespace: See argparse.

        Returns:
            The namespace and the remaining words.

        Raises:
            InputError: If an option is unknown.
        """
        if self._subparsers is None:
            known = self._option_string_actions
            for word in args:
                option = word.partition("=")[0]
                if option.startswith("--") and option != "--" and option not in known:
                    ending = self._explain(option) or did_you_mean(option, known)
                    raise InputError(f"unknown option {option}{ending}")
        return super().parse_known_args(args, namespace)


def add_early_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of all commands that compute; cptv_jax.cli.main reads them before the command's modules.

    Args:
        parser: The command's parser.
    """
    parser.add_argument(
        COMPILATION_CACHE,
        metavar="DIR|off",
        help="where compiled programs are kept for the next run (default: a folder of the user's cache directory)",
    )
    parser.add_argument(
        PLUGIN,
        metavar="MODULES",
        help="modules of your own, separated by commas, that register quantizers, methods, strategies or families",
    )


def value_of(words: Sequence[str], option: str) -> str | None:
    """Finds the value of an option before the command line is parsed.

    Args:
        words: The command line.
        option: The option, such as "--config".

    Returns:
        The last value given; None if there is none.
    """
    found = None
    for word, following in zip(words, [*words, None][1:], strict=True):
        if word == option:
            found = following
        elif word.startswith(f"{option}="):
            found = word.partition("=")[2]
    return found
