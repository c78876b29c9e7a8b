"""Modules of users that register quantizers, methods, strategies or families, for the command line."""

import os
import sys
from importlib import import_module

from cptv_jax.errors import InputError

VARIABLE = "CPTV_PLUGINS"  # by which processes that a command starts import them too


def import_plugins(names: str | None = None) -> None:
    """Imports modules that register what configurations and checkpoints name.

    Modules of the working directory are found. The names are kept in the environment variable CPTV_PLUGINS, which is
    read where none are given, so that child processes import the same modules.

    Args:
        names: Names of modules, separated by commas; None takes those of the environment variable.

    Raises:
        InputError: If a module cannot be found.

    Example:
        >>> import_plugins("my_quantizers,my_methods")
    """
    given = os.environ.get(VARIABLE, "") if names is None else names
    if not given:
        return
    os.environ[VARIABLE] = given
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    for name in given.split(","):
        try:
            import_module(name.strip())
        except ModuleNotFoundError as error:
            raise InputError(
                f"--plugin {name}: there is no module {error.name}; check its name, or run the command in its folder"
            ) from None
