"""Configurations from YAML files and from flags."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cptv_jax.config.older import refuse_older
from cptv_jax.config.schema import QuantizeConfig
from cptv_jax.config.yaml12 import read_yaml
from cptv_jax.errors import InputError
from cptv_jax.options import from_mapping


def load_config(path: str | Path | None) -> QuantizeConfig:
    """Reads a configuration.

    Args:
        path: A YAML file; None gives all defaults.

    Returns:
        The configuration, with defaults where the file is silent.

    Raises:
        InputError: For a missing or malformed file, an unknown field, or a value of a wrong type or out of bounds.

    Example:
        >>> config = load_config("configs/guided_w4a8.yaml")
    """
    return QuantizeConfig() if path is None else config_from(read_config(path), str(path))


def read_config(path: str | Path) -> Any:
    """Reads what a configuration file says, without defaults.

    Args:
        path: A YAML file.

    Returns:
        Plain data, unchecked.

    Raises:
        InputError: For a missing file, or one that is not valid YAML.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
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
