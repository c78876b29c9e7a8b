"""Registries: the meanings of names in configurations, checkpoints and commands."""

from collections.abc import Iterator, Mapping
from typing import Generic, TypeVar

from cptv_jax.errors import InputError, did_you_mean

T = TypeVar("T")


class Registry(Mapping[str, T], Generic[T]):
    """Things of one kind by name: the library's own, and those that a user registers.

    A registry is the only kind of object here that is global and grows: code that reads a name from a file has to know
    what the name stands for, even if user code defined it. A name is never given a second meaning.

    Args:
        kind: The kind of things, for messages ("base method").

    Example:
        >>> colours: Registry[str] = Registry("colour")
        >>> colours.register("red", "#ff0000")
        '#ff0000'
        >>> colours.find("red", field="paint.colour")
        '#ff0000'
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._known: dict[str, T] = {}

    def register(self, name: str, thing: T) -> T:
        """Adds a thing under a name.

        Args:
            name: The name, as configurations and checkpoints write it.
            thing: The thing that it stands for.

        Returns:
            The thing, so that it can be registered where it is defined.

        Raises:
            InputError: If the name already stands for something else.
        """
        if self._known.setdefault(name, thing) is not thing:
            raise InputError(f"there is a {self.kind} '{name}' already; register yours under another name")
        return thing

    def find(self, name: object, field: str) -> T:
        """Finds the thing of a name.

        Args:
            name: The name, as it was read.
            field: The place where it was read, for the message ("search.strategy").

        Returns:
            The thing.

        Raises:
            InputError: For an unknown name, with the nearest known one.
        """
        if not isinstance(name, str) or name not in self._known:
            raise InputError(f"{field} is {name!r}{did_you_mean(str(name), self._known)}")
        return self._known[name]

    def __getitem__(self, name: str) -> T:
        return self._known[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._known)

    def __len__(self) -> int:
        return len(self._known)
