"""Command-line flags for the fields of options: derived from the classes, read as YAML."""

import argparse
import re
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, is_dataclass
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

from cptv_jax.cli.parser import value_of
from cptv_jax.config.older import present_name
from cptv_jax.config.yaml12 import read_value
from cptv_jax.errors import InputError
from cptv_jax.options import OptionField, Tag, fields_of, from_mapping, options_of, to_mapping

T = TypeVar("T")
SOURCE = "command line"
_METAVARS = {int: "N", float: "X", bool: "BOOL", str: "TEXT", dict: "MAPPING"}


@dataclass(frozen=True)
class Flag:
    """A flag of one field.

    Attributes:
        name: The field's dotted name, which is the flag's.
        field: The field.
        value: The field's value unless the flag is given.
    """

    name: str
    field: OptionField
    value: Any

    @property
    def choices(self) -> tuple[str, ...]:
        """The words to choose from; empty for a field that is not a choice."""
        return tuple(self.field.tag.registry) if self.field.tag else _words(self.field.annotation)

    @property
    def metavar(self) -> str:
        """The placeholder of the flag's value in the help."""
        if self.choices:
            return "NAME"
        return next((_METAVARS[kind] for kind in _types(self.field.annotation) if kind in _METAVARS), "LIST")

    @property
    def help(self) -> str:
        """The flag's help: its sentence, its choices and its default."""
        default = type(self.value).name if self.field.tag else _shown(self.value)
        choices = f"choices: {', '.join(self.choices)}; " if self.choices else ""
        return f"{self.field.help} ({choices}default: {default})".replace("%", "%%")


@dataclass(frozen=True)
class Group:
    """The flags of one class of options.

    Attributes:
        title: Its place in the configuration.
        summary: The first paragraph of the class's docstring.
        flags: The flags of its fields.
    """

    title: str
    summary: str
    flags: tuple[Flag, ...]


def _types(annotation: Any) -> Iterator[Any]:
    """The types that a union is made of, and what generic ones are made from."""
    origin = get_origin(annotation)
    if origin in (Union, types.UnionType):
        for part in get_args(annotation):
            yield from _types(part)
    elif origin is Annotated:
        yield from _types(get_args(annotation)[0])
    else:
        yield origin or annotation


def _words(annotation: Any) -> tuple[str, ...]:
    if get_origin(annotation) is Literal:
        return tuple(str(word) for word in get_args(annotation))
    if get_origin(annotation) in (Union, types.UnionType, Annotated):
        return tuple(word for part in get_args(annotation) for word in _words(part))
    return ()


def _shown(value: Any) -> str:
    """A value as one would type it."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_shown, value))}]"
    return f"{value:g}" if isinstance(value, float) else str(value)


def groups_of(value: Any, prefix: str = "", title: str = "general") -> list[Group]:
    """Lists the flags of options, including those of nested options.

    Args:
        value: The options; their values are the defaults.
        prefix: The beginning of the flags' names.
        title: Title of the first group.

    Returns:
        A group for each class of options that has a field of its own.
    """
    flags: list[Flag] = []
    inner: list[Group] = []
    for field in fields_of(_class(value)):
        name, own = f"{prefix}{field.name}", getattr(value, field.name)
        if field.tag or not is_dataclass(own):
            flags.append(Flag(name, field, own))
        if is_dataclass(own):
            inner += groups_of(own, f"{name}.", _title(name, field.tag, own))
    summary = (type(value).__doc__ or "").strip().split("\n\n")[0]
    return [*([Group(title, " ".join(summary.split()), tuple(flags))] if flags else []), *inner]


def _class(value: Any) -> Any:
    """The class of options of a value, or of a registered entry."""
    return options_of(value) if isinstance(value, type) or hasattr(value, "options") else type(value)


def _title(name: str, tag: Tag | None, value: Any) -> str:
    return f"{name} {type(value).name}" if tag else name


def flags_of(value: Any) -> dict[str, Flag]:
    """Lists the flags of options, as `groups_of` does.

    Args:
        value: The options; their values are the defaults.

    Returns:
        The flags by name.
    """
    return {flag.name: flag for group in groups_of(value) for flag in group.flags}


def add_flags(parser: argparse.ArgumentParser, value: Any) -> None:
    """Adds a flag for each field of options; a flag that is not given leaves no attribute.

    Args:
        parser: The parser.
        value: The options; their values are shown as defaults.
    """
    for group in groups_of(value):
        added = parser.add_argument_group(group.title, group.summary.replace("%", "%%"))
        for flag in group.flags:
            text = flag.help
            if flag.field.tag:
                text += f" -- for the options of another, give --{flag.name} NAME before --help"
            added.add_argument(f"--{flag.name}", metavar=flag.metavar, default=argparse.SUPPRESS, help=text)


def choose(value: T, words: Sequence[str]) -> T:
    """Applies the flags of a command line that choose classes of options, such as --search.strategy.

    Args:
        value: The options.
        words: The command line.

    Returns:
        The options with the chosen classes; a class that they already have keeps its fields.

    Raises:
        InputError: If a name is unknown.
    """
    data = to_mapping(value)
    for name, flag in flags_of(value).items():
        text = value_of(words, f"--{name}") if flag.field.tag else None
        chosen = None if text is None else read_value(text, f"--{name}")
        if text is not None and chosen != type(flag.value).name:
            _set(data, name, chosen)
    return _build(type(value), data, tuple(flags_of(value)))


def override(value: T, changes: Mapping[str, str]) -> T:
    """Sets fields from flags.

    Args:
        value: The options, with the classes that the command line chooses (see `choose`).
        changes: YAML text by dotted name, such as {"search.strategy.passes": "3"}.

    Returns:
        The options with these fields.

    Raises:
        InputError: If a value has a wrong type or is out of bounds; the message names the flag.
    """
    data, flags = to_mapping(value), flags_of(value)
    for name, text in changes.items():
        if not flags[name].field.tag:
            _set(data, name, read_value(text, f"--{name}"))
    return _build(type(value), data, tuple(flags))


def _set(data: dict[str, Any], name: str, value: Any) -> None:
    *groups, last = name.split(".")
    for group in groups:
        data = data[group]
    data[last] = value


def _build(cls: type[T], data: Mapping[str, Any], names: Sequence[str]) -> T:
    try:
        return from_mapping(cls, data, SOURCE)
    except InputError as error:
        raise InputError(spell(str(error).removeprefix(f"{SOURCE}: "), names)) from None


def spell(message: str, names: Sequence[str]) -> str:
    """Writes the names of fields in a message as flags.

    Args:
        message: A sentence.
        names: Dotted names of fields.

    Returns:
        The sentence with dashes before these names; plain words within it stay as they are.
    """
    known = "|".join(re.escape(name) for name in sorted(names, key=len, reverse=True) if "." in name)
    message = re.sub(rf"(?<![\w.-])({known})(?![\w-]|\.[a-z])", r"--\1", message)
    first = message.partition(" ")[0]
    return f"--{message}" if first in names and "." not in first else message


def explain(value: Any, option: str) -> str | None:
    """Explains a flag that options lack.

    Args:
        value: The options.
        option: The flag.

    Returns:
        The end of a sentence if the flag belongs to an older cptv or to another class of options, else None.
    """
    name = option.removeprefix("--")
    now = present_name(name)
    if now is not None and now not in (name, "method"):
        return f", which is of an older cptv; it is --{now} now"
    for flag in flags_of(value).values():
        field = name.removeprefix(f"{flag.name}.")
        if flag.field.tag is None or field == name:
            continue
        having = [
            known
            for known, thing in flag.field.tag.registry.items()
            if field in (own.name for own in fields_of(_class(thing)))
        ]
        if having:
            owners, present = " and ".join(having), type(flag.value).name
            return f", which is an option of {owners}, not of {present}; give --{flag.name} NAME"
    return None
