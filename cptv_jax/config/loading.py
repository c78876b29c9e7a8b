"""Configurations from YAML files and from flags, and back to plain data."""

import dataclasses
import types
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from cptv_jax.config.schema import QuantizeConfig, flatten, to_mapping
from cptv_jax.config.shipped import find_config
from cptv_jax.errors import InputError, did_you_mean
from cptv_jax.storage.run_file import refuse_config_of_other_format

T = TypeVar("T")


def load_config(path: str | None) -> QuantizeConfig:
    """Reads a configuration; fields that it does not set have their defaults.

    Args:
        path: a YAML file, or the name of a shipped configuration such as "evol-q_w4a8"; None for all defaults.

    Raises:
        InputError: the file is missing, malformed or of a run of another format, a field is unknown, or a value has
            the wrong type.
    """
    if path is None:
        return QuantizeConfig()
    file = find_config(path)
    refuse_config_of_other_format(file)
    try:
        data = yaml.safe_load(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"there is no configuration file {path}; check --config") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read ({error})") from None
    except yaml.YAMLError as error:
        raise InputError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    return from_mapping(QuantizeConfig, {} if data is None else data, path)


def from_mapping(cls: type[T], data: Any, source: str, prefix: str = "") -> T:
    """A configuration dataclass from nested mappings, strictly."""
    if not isinstance(data, Mapping):
        raise InputError(f"{source}: {prefix.rstrip('.') or 'the file'} must be a mapping of fields")
    hints = get_type_hints(cls)
    values = {}
    for key, value in data.items():
        if key not in hints:
            raise InputError(f"{source}: unknown field '{prefix}{key}'{did_you_mean(str(key), hints)}")
        values[key] = _convert(hints[key], value, source, f"{prefix}{key}")
    return cls(**values)


def _convert(hint: Any, value: Any, source: str, name: str) -> Any:
    if dataclasses.is_dataclass(hint):
        return from_mapping(hint, value, source, f"{name}.")  # type: ignore[arg-type]
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        return _convert(next(a for a in arguments if a is not type(None)), value, source, name)
    if origin is Literal:
        if value not in arguments:
            raise InputError(f"{source}: {name} is {value!r}{did_you_mean(str(value), map(str, arguments))}")
        return value
    if origin is tuple:
        items = [value] if isinstance(value, str) else value
        if not isinstance(items, list | tuple) or not items:
            raise InputError(f"{source}: {name} must be a list that is not empty")
        return tuple(_convert(arguments[0], item, source, name) for item in items)
    if origin is dict:
        if not isinstance(value, Mapping):
            raise InputError(f"{source}: {name} must be a mapping")
        for key in value:
            if not isinstance(key, str):
                raise InputError(f"{source}: {name} has the key {key!r}; it must be text")
        return dict(value)
    if hint is float and isinstance(value, str):  # YAML reads 1e-3 as a string
        with suppress(ValueError):
            value = float(value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise InputError(f"{source}: {name} is {value!r}; it must be {_describe(hint)}")
    return value


def _describe(hint: Any) -> str:
    return {int: "a whole number", float: "a number", bool: "true or false", str: "text"}.get(hint, str(hint))


def override(config: QuantizeConfig, changes: Mapping[str, str]) -> QuantizeConfig:
    """The configuration with fields, by dotted name, set from YAML text (`--search.passes 3`).

    Raises InputError for an unknown name or a value of the wrong type.
    """
    data = to_mapping(config)
    names = flatten(config)
    for name, text in changes.items():
        if name not in names:
            raise InputError(f"unknown option --{name}{did_you_mean(name, names)}")
        *groups, last = name.split(".")
        node = data
        for group in groups:
            node = node[group]
        try:
            node[last] = yaml.safe_load(text)
        except yaml.YAMLError:
            node[last] = text  # such as *.weight, which YAML takes for an alias
    return from_mapping(QuantizeConfig, data, "command line")
