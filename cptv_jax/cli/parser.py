"""An argument parser that reports bad usage like any other bad input, and knows no abbreviations."""

import argparse
from collections.abc import Callable
from typing import Any, NoReturn

from cptv_jax.errors import InputError, did_you_mean


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
