"""Configurations from YAML files and from flags."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cptv_jax.config.older import refuse_older
from cptv_jax.config.schema import QuantizeConfig
from cptv_jax.config.shipped import find_config
from cptv_jax.config.yaml12 import read_yaml
from cptv_jax.errors import InputError
from cptv_jax.options import from_mapping
from cptv_jax.storage.run_file import refuse_config_of_other_format


def load_config(path: str | Path | None) -> QuantizeConfig:
    """Reads a configuration.

    Args:
        path: A YAML file, or the name of a shipped configuration such as "evol-q_w4a8"; None gives all defaults.

    Returns:
        The configuration, with defaults where the file is silent.

    Raises:
        InputError: For a missing or malformed file, an unknown field, or a value of a wrong type or out of bounds.

    Example:
        >>> config = load_config("guided_w4a8")
    """
    return QuantizeConfig() if path is None else config_from(read_config(path), str(path))


def read_config(path: str | Path) -> Any:
    """Reads what a configuration file says, without defaults.

    Args:
        path: A YAML file, or the name of a shipped configuration.

    Returns:
        Plain data, unchecked.

    Raises:
        InputError: For a missing file, one that is not valid YAML, or one of a run of another format.
    """
    file = find_config(str(path))
    refuse_config_of_other_format(file)
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise InputError(f"there is no configuration file {path}; check --config") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read ({error})") from None
    data = read_yaml(text, str(path))
    return {} if data is None else data


def config_from(data: Any, source: str) -> QuantizeConfig:
    """Builds a configuration from nested mappings, as `to_mapping` makes them.

    Args:
        data: Fields by name.
        source: Where they come from, for messages.

    Returns:
        The configuration.

    Raises:
        InputError: For whatever is wrong in it, and for a configuration of an older cptv.
    """
    if isinstance(data, Mapping):
        refuse_older(data, source)
    return from_mapping(QuantizeConfig, data, source)
