"""YAML 1.2, strictly: what people mean by 1e-3, on and 010, and no key given twice."""

import re
from typing import Any

import yaml

from cptv_jax.errors import InputError


class _Loader(yaml.SafeLoader):
    """Knows the core schema of version 1.2.

    PyYAML's own reads version 1.1, in which on, off, yes and no are truth values, 010 is eight, 1:30 ninety and 1e-3
    text.
    """

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 - PyYAML's own


_NULL = re.compile(r"^(?:~|null|Null|NULL|)$")
_BOOL = re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$")
_INT = re.compile(r"^(?:[-+]?[0-9]+|0x[0-9a-fA-F]+)$")
_FLOAT = re.compile(
    r"^(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
)
for _tag, _pattern, _firsts in (
    ("null", _NULL, ["~", "n", "N", ""]),
    ("bool", _BOOL, list("tTfF")),
    ("int", _INT, list("-+0123456789")),
    ("float", _FLOAT, list("-+.0123456789")),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", _pattern, _firsts)


def _whole_number(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int:
    text = str(loader.construct_scalar(node))
    return int(text, 16) if text.startswith("0x") else int(text)


def _mapping(loader: yaml.SafeLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    found: dict[Any, Any] = {}
    for key_node, value_node in node.value:
        key = loader.construct_object(key_node, deep=True)
        try:
            twice = key in found
        except TypeError:
            raise yaml.constructor.ConstructorError(None, None, "a key is not text", key_node.start_mark) from None
        if twice:
            raise yaml.constructor.ConstructorError(None, None, f"'{key}' is given twice", key_node.start_mark)
        found[key] = loader.construct_object(value_node, deep=True)
    return found


_Loader.add_constructor("tag:yaml.org,2002:int", _whole_number)
_Loader.add_constructor("tag:yaml.org,2002:map", _mapping)


class _ValueLoader(_Loader):
    """For a value alone, where no alias can stand: a pattern such as *.weight needs no quotes."""

    def fetch_alias(self) -> None:
        self.fetch_plain()


def read_yaml(text: str, source: str) -> Any:
    """Reads a YAML document.

    Args:
        text: The document.
        source: Where it comes from, for messages.

    Returns:
        Plain data.

    Raises:
        InputError: If it is not valid YAML, or a key is given twice.
    """
    return _read(text, source, _Loader)


def read_value(text: str, source: str) -> Any:
    """Reads the value of one field, in which patterns such as *.weight need no quotes.

    Args:
        text: The value.
        source: Where it comes from, for messages.

    Returns:
        Plain data.

    Raises:
        InputError: If it is not valid YAML, or a key is given twice.
    """
    return _read(text, source, _ValueLoader)


def _read(text: str, source: str, loader: type[_Loader]) -> Any:
    try:
        return yaml.load(text, loader)
    except (yaml.YAMLError, ValueError) as error:
        hint = "; put names that begin with * in quotes" if "alias" in str(error) else ""
        raise InputError(f"{source} is not valid YAML: {' '.join(str(error).split())}{hint}") from None
