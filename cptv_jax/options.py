"""Options: frozen dataclasses whose fields are checked whenever one is built, from Python as from YAML."""

import dataclasses
import json
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Annotated, Any, TypeVar, cast, dataclass_transform

import pydantic
from pydantic import ConfigDict, ValidationError
from pydantic_core import ErrorDetails

from cptv_jax.errors import InputError, did_you_mean
from cptv_jax.registry import Registry

T = TypeVar("T")

_CONFIG = ConfigDict(strict=True, extra="forbid", use_attribute_docstrings=True, arbitrary_types_allowed=True)
_TYPES = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "text",
    "dict_type": "a mapping",
    "dataclass_type": "a mapping of fields",
    "tuple_type": "a list",
}
_BOUNDS = {
    "greater_than": "must be greater than {gt}",
    "greater_than_equal": "must be at least {ge}",
    "less_than": "must be below {lt}",
    "less_than_equal": "must be at most {le}",
    "finite_number": "must be a finite number",
    "too_short": "must be a list that is not empty",
}


_LIMITS = ("gt", "ge", "lt", "le")


def _as_tuple(value: Any) -> Any:
    return (value,) if isinstance(value, str) else tuple(value) if isinstance(value, list) else value


Names = Annotated[tuple[str, ...], pydantic.BeforeValidator(_as_tuple), pydantic.Field(min_length=1)]
"""A tuple of at least one word; a list or a single word is converted to one."""

Numbers = Annotated[
    tuple[Annotated[int, pydantic.Field(ge=1)], ...], pydantic.BeforeValidator(_as_tuple), pydantic.Field(min_length=1)
]
"""A tuple of at least one whole number, each at least 1; a list is converted to one."""


@dataclass_transform(frozen_default=True, field_specifiers=(dataclasses.field, pydantic.Field))
def options(cls: type[T]) -> type[T]:
    """Makes a class a frozen dataclass whose fields are checked when an instance is built.

    Types are strict (a whole number counts as a number, nothing else is converted), unknown fields are refused, and
    bounds are those of `pydantic.Field`. A docstring below a field is its help on the command line.

    Args:
        cls: A class with annotated fields, as for `dataclasses.dataclass`.

    Returns:
        The dataclass, which raises InputError if a field is wrong.

    Example:
        >>> @options
        ... class Walk:
        ...     steps: int = pydantic.Field(default=3, ge=1)
        ...     '''How many steps to take.'''
        >>> Walk(steps=0)
        Traceback (most recent call last):
        cptv_jax.errors.InputError: steps is 0; it must be at least 1
    """
    built = pydantic.dataclasses.dataclass(cls, frozen=True, config=_CONFIG)
    checked: Callable[..., None] = built.__init__

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        try:
            checked(self, *args, **kwargs)
        except ValidationError as error:
            raise InputError(_explain(built, error)) from None

    built.__init__ = __init__  # type: ignore[method-assign]
    return cast("type[T]", built)


class _Inside(ValueError):
    """An error in options that a tag chose, on its way through the options around them."""

    def __init__(self, cls: type[Any], error: ValidationError) -> None:
        super().__init__(str(error))
        self.cls, self.error = cls, error


@dataclasses.dataclass(frozen=True)
class Tag:
    """Marks a field whose options are of one of several classes.

    Attributes:
        registry: By name, the classes, or things that name their class as `options`.
    """

    registry: Registry[Any]


def one_of(registry: Registry[Any]) -> Any:
    """Makes the type of a field that holds options of one of several classes, told apart by their name.

    In YAML such a field is a mapping with a `name` in addition to the fields, or the name alone; in Python it is an
    instance.

    Args:
        registry: The classes by name, including those that users register.

    Returns:
        An annotation for a field of a class of options.
    """

    def from_tag(value: Any) -> Any:
        if isinstance(value, tuple(options_of(known) for known in registry.values())):
            return value
        fields = {"name": value} if isinstance(value, str) else value
        if not isinstance(fields, Mapping) or "name" not in fields:
            raise ValueError(f"must be a {registry.kind}, or a mapping with its name{did_you_mean('', registry)}")
        if not isinstance(fields["name"], str) or fields["name"] not in registry:
            raise ValueError(f"is '{fields['name']}'{did_you_mean(str(fields['name']), registry)}")
        cls = options_of(registry[fields["name"]])
        try:
            return _read(cls, {name: field for name, field in fields.items() if name != "name"})
        except ValidationError as error:
            raise _Inside(cls, error) from None

    return Annotated[Any, pydantic.BeforeValidator(from_tag), Tag(registry)]


def options_of(registered: Any) -> type[Any]:
    """Finds the class of the options of a registered thing.

    Args:
        registered: A class of options, or something that names one as its `options`.

    Returns:
        The class.
    """
    return registered if isinstance(registered, type) else registered.options


@lru_cache(maxsize=64)
def _adapter(cls: type[Any]) -> pydantic.TypeAdapter[Any]:
    return pydantic.TypeAdapter(cls)


def _read(cls: type[T], data: Mapping[str, Any]) -> T:
    # As JSON, where strictness allows mappings for options and lists for tuples.
    return cast(T, _adapter(cast(Any, cls)).validate_json(json.dumps(dict(data), default=str)))


def from_mapping(cls: type[T], data: Any, source: str) -> T:
    """Builds options from nested mappings, as YAML and JSON hold them.

    Args:
        cls: The class of the options.
        data: Fields by name; options within options are mappings too.
        source: Where the data come from, for messages.

    Returns:
        The options, with defaults for the fields that the data lack.

    Raises:
        InputError: For data that are not a mapping, an unknown field, or a value of a wrong type or out of bounds.
    """
    if not isinstance(data, Mapping):
        raise InputError(f"{source}: the configuration must be a mapping of fields")
    _check_keys(data, source)
    try:
        return _read(cls, data)
    except ValidationError as error:
        raise InputError(f"{source}: {_explain(cls, error)}") from None


def _check_keys(data: Mapping[Any, Any], source: str, name: str = "") -> None:
    """Checks that all keys are text, because JSON, through which options are read, would make them text.

    Raises:
        InputError: For another key.
    """
    for key, value in data.items():
        if not isinstance(key, str):
            what = (
                f"{name} has the key {key!r}; it must be" if name else f"a field is called {key!r}; names of fields are"
            )
            raise InputError(f"{source}: {what} text")
        if isinstance(value, Mapping):
            _check_keys(value, source, f"{name}.{key}" if name else key)


def to_mapping(value: Any) -> Any:
    """Converts options to nested mappings and lists, as YAML and JSON hold them; `from_mapping` reads them back.

    Args:
        value: Options, or the value of one of their fields.

    Returns:
        Plain data; options that a tag chose have their `name` first.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        name = getattr(type(value), "name", None)
        fields = {field.name: to_mapping(getattr(value, field.name)) for field in dataclasses.fields(value)}
        return {"name": name, **fields} if isinstance(name, str) else fields
    if isinstance(value, Mapping):
        return {key: to_mapping(item) for key, item in value.items()}
    return [to_mapping(item) for item in value] if isinstance(value, list | tuple) else value


def _explain(cls: type[Any], error: ValidationError, prefix: tuple[str, ...] = ()) -> str:
    """Returns a sentence about the first error that names the field and the remedy."""
    found = error.errors(include_url=False)[0]
    path = (*prefix, *_name_path(cls, found["loc"]))
    if found["type"] != "value_error":
        return _word_error(cls, found, path, prefix)
    reason = found["ctx"]["error"]
    if isinstance(reason, _Inside):
        return _explain(reason.cls, reason.error, path)
    return str(reason) if isinstance(reason, InputError) else f"{'.'.join(path)} {reason}"


def _name_path(cls: type[Any], location: tuple[int | str, ...]) -> list[str]:
    """Returns the place of an error as names, even if an argument was given by its position."""
    first = [dataclasses.fields(cls)[part].name if isinstance(part, int) else part for part in location[:1]]
    return [*first, *map(str, location[1:])]


def _word_error(cls: type[Any], found: ErrorDetails, path: tuple[str, ...], prefix: tuple[str, ...]) -> str:
    kind, value, context, name = found["type"], found["input"], found.get("ctx", {}), ".".join(path)
    if kind in ("unexpected_keyword_argument", "extra_forbidden"):
        *groups, last = (str(part) for part in found["loc"])
        return f"unknown field '{name}'{did_you_mean(last, _fields_at(cls, groups))}"
    if kind == "dataclass_exact_type":
        return f"{name} is {value!r}; it must be a {context['class_name']}"
    if path[-1] == "[key]":
        return f"{'.'.join(path[:-2])} has the key {value!r}; it must be text"
    if kind == "literal_error":
        known = [word.strip(" '") for word in context["expected"].replace(" or ", ", ").split(",")]
        return f"{name} is {value!r}{did_you_mean(str(value), known)}"
    if kind in _BOUNDS:
        bounds = {key: int(bound) if bound == int(bound) else bound for key, bound in context.items() if key in _LIMITS}
        return f"{name} is {value}; it {_BOUNDS[kind].format(**bounds)}"
    return f"{name} is {value!r}; it must be {_TYPES[kind]}" if kind in _TYPES else f"{name}: {found['msg']}"


def _fields_at(cls: type[Any], groups: list[str]) -> list[str]:
    """Returns the names of the fields of the options that stand at a path of field names within others."""
    here: Any = cls
    for group in groups:
        inner = {field.name: field.type for field in dataclasses.fields(here)} if dataclasses.is_dataclass(here) else {}
        here = inner.get(group, here)
    return [field.name for field in dataclasses.fields(here)] if dataclasses.is_dataclass(here) else []


@dataclasses.dataclass(frozen=True)
class OptionField:
    """A field of options.

    Attributes:
        name: The field's name.
        annotation: Its type.
        tag: If options of several classes can stand there: which classes.
        help: Its docstring, on one line.
    """

    name: str
    annotation: Any
    tag: Tag | None
    help: str


@lru_cache(maxsize=64)
def fields_of(cls: type[Any]) -> tuple[OptionField, ...]:
    """Lists the fields of a class of options, in order.

    Args:
        cls: A class made by `options`.

    Returns:
        Name, type and help of each.
    """
    found = []
    for name, field in cls.__pydantic_fields__.items():
        tag = next((mark for mark in field.metadata if isinstance(mark, Tag)), None)
        found.append(OptionField(name, field.annotation, tag, " ".join((field.description or "").split())))
    return tuple(found)


def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """Lists options by dotted name.

    Args:
        value: Options.
        prefix: Put before every name.

    Returns:
        The values of all fields; options that a tag chose appear as their name and their fields.
    """
    flat: dict[str, Any] = {}
    for field in fields_of(cast(Any, type(value))):
        name, inner = f"{prefix}{field.name}", getattr(value, field.name)
        if field.tag:
            flat[name] = type(inner).name
        if dataclasses.is_dataclass(inner):
            flat |= flatten(inner, f"{name}.")
        elif not field.tag:
            flat[name] = inner
    return flat
