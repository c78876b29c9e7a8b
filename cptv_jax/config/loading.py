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
        The configuration, with defaults for the fields that the file leaves out.

    Raises:
        InputError: If the file is missing or malformed, a field is unknown, or a value has a wrong type or is out of
            bounds.

    Example:
        >>> config = load_config("guided_w4a8")
    """
    return QuantizeConfig() if path is None else config_from(read_config(path), str(path))


def read_config(path: str | Path) -> Any:
    """Reads a configuration file without filling in defaults.

    Args:
        path: A YAML file, or the name of a shipped configuration.

    Returns:
        Plain data, unchecked.

    Raises:
        InputError: If the file is missing, is not valid YAML, or belongs to a run of another format.
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
        InputError: If a field is unknown or has an invalid value, or if the configuration has the form of an older
            cptv.
    """
    if isinstance(data, Mapping):
        refuse_older(data, source)
    return from_mapping(QuantizeConfig, data, source)
