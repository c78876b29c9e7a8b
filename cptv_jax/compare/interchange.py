"""The interchange format, version 1: reading a set's files strictly, never unpickling."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cptv_jax.errors import InputError, did_you_mean, one_line
from cptv_jax.models.weight_files import read_npz_arrays

FORMAT = 1
_REMEDY = "see docs/interchange.md"


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """Reads all arrays of an .npz file.

    Args:
        path: The file.

    Returns:
        The arrays by key.

    Raises:
        InputError: For a file that is missing or damaged, or that holds pickled objects.
    """
    if not path.is_file():
        raise InputError(f"{path} does not exist or is not a file; {_REMEDY}")
    return dict(read_npz_arrays(path, str(path), _REMEDY, _REMEDY))


@dataclass(frozen=True)
class Meta:
    """The fields of `meta`, read by dotted name ("calibration.batch"). Every error names the file and the field.

    Attributes:
        path: The file.
        fields: The nested fields.
    """

    path: Path
    fields: Mapping[str, Any]

    def _get(self, name: str) -> Any:
        value: Any = self.fields
        for part in name.split("."):
            if not isinstance(value, dict) or part not in value:
                raise InputError(f"{self.path}: meta lacks '{name}'; {_REMEDY}")
            value = value[part]
        return value

    def integer(self, name: str, least: int = 1, most: int | None = None) -> int:
        """Reads a whole number within bounds.

        Args:
            name: The field.
            least: The smallest that is allowed.
            most: The largest that is allowed; None allows any.

        Returns:
            The number.

        Raises:
            InputError: If the field is missing, not a whole number, or out of bounds.
        """
        value = self._get(name)
        # JSON written from NumPy or JavaScript may say 4.0.
        whole = isinstance(value, int) and not isinstance(value, bool)
        whole = whole or (isinstance(value, float) and value.is_integer())
        if not whole or value < least or (most is not None and value > most):
            bounds = f"of at least {least}" if most is None else f"from {least} to {most}"
            raise InputError(f"{self.path}: meta.{name} is {value!r}, but must be a whole number {bounds}")
        return int(value)

    def number(self, name: str) -> float:
        """Reads a positive number.

        Args:
            name: The field.

        Returns:
            The number.

        Raises:
            InputError: If the field is missing or not a positive finite number.
        """
        value = self._get(name)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
            raise InputError(f"{self.path}: meta.{name} is {value!r}, but must be a positive number")
        return float(value)

    def flag(self, name: str) -> bool:
        """Reads true or false.

        Args:
            name: The field.

        Returns:
            The truth value.

        Raises:
            InputError: If the field is missing or neither.
        """
        value = self._get(name)
        if not isinstance(value, bool):
            raise InputError(f"{self.path}: meta.{name} is {value!r}, but must be true or false")
        return value

    def choice(self, name: str, known: Sequence[str]) -> str:
        """Reads one of several known words.

        Args:
            name: The field.
            known: The words.

        Returns:
            The word.

        Raises:
            InputError: If the field is missing or another word.
        """
        value = self._get(name)
        if value not in known:
            raise InputError(f"{self.path}: meta.{name} is {value!r}; supported: {', '.join(known)}")
        return str(value)

    def neighbour(self, name: str) -> Path:
        """Finds the file that a field names, in the folder of this one.

        Args:
            name: The field.

        Returns:
            The file's path.

        Raises:
            InputError: If the field is missing or not a name, or the file does not exist.
        """
        value = self._get(name)
        if not isinstance(value, str) or not value:
            raise InputError(f"{self.path}: meta.{name} is {value!r}, but must be the name of a file beside it")
        path = self.path.parent / value
        if not path.is_file():
            raise InputError(f"{self.path}: meta.{name} names '{value}', which does not lie beside it")
        return path

    def index_range(self, name: str, count: int, what: str) -> range:
        """Reads a half-open range [first, past the last] of positions.

        Args:
            name: The field.
            count: How many things there are.
            what: Their name in messages.

        Returns:
            The range, not empty.

        Raises:
            InputError: If the field is missing, not such a range, or ends beyond the count.
        """
        value = self._get(name)
        ints = isinstance(value, list) and len(value) == 2 and all(type(bound) is int for bound in value)
        if not ints or not 0 <= value[0] < value[1]:
            raise InputError(f"{self.path}: meta.{name} is {value!r}, but must be [first, past the last]")
        if value[1] > count:
            raise InputError(f"{self.path}: meta.{name} ends at {value[1]}, but there are only {count} {what}")
        return range(value[0], value[1])


@dataclass(frozen=True)
class ArrayFile:
    """Named arrays of one file, read with checks of shape and type.

    Attributes:
        path: The file.
        arrays: The arrays by key.
    """

    path: Path
    arrays: Mapping[str, np.ndarray]

    def __contains__(self, key: str) -> bool:
        return key in self.arrays

    def under(self, prefix: str) -> list[str]:
        """Lists the names directly under a prefix, such as ["0", "1"] for "evo/".

        Args:
            prefix: The prefix, with its slash.

        Returns:
            The names, in the file's order.
        """
        return list(dict.fromkeys(k.removeprefix(prefix).split("/")[0] for k in self.arrays if k.startswith(prefix)))

    def block_indices(self, prefix: str, depth: int) -> list[int]:
        """Lists the blocks with arrays directly under a prefix such as "block_out/".

        Args:
            prefix: The prefix, with its slash.
            depth: The model's number of blocks.

        Returns:
            Positions of blocks, in ascending order.

        Raises:
            InputError: For a name that is not a block of the model.
        """
        names = self.under(prefix)
        if not all(name.isdecimal() and int(name) < depth for name in names):
            raise InputError(f"{self.path}: '{prefix}' holds a block that a model of depth {depth} lacks")
        return sorted(int(name) for name in names)

    def raw(self, key: str) -> np.ndarray:
        """Reads an array of any shape and type.

        Args:
            key: Its key.

        Returns:
            The array.

        Raises:
            InputError: If there is none, with the nearest keys.
        """
        if key not in self.arrays:
            raise InputError(f"{self.path} lacks the array '{key}'{did_you_mean(key, self.arrays, limit=3)}")
        return self.arrays[key]

    def array(self, key: str, *shape: int | None) -> np.ndarray:
        """Reads numbers of a given shape, floating or integer as they are.

        Args:
            key: The array's key.
            *shape: The length of each axis; None allows any.

        Returns:
            The array.

        Raises:
            InputError: If the array is missing, not of numbers, or of another shape.
        """
        found = self.raw(key)
        if found.dtype.kind not in "fiu":
            raise InputError(f"{self.path}: array '{key}' is {found.dtype}, but must hold numbers")
        fits = found.ndim == len(shape) and all(
            want is None or have == want for have, want in zip(found.shape, shape, strict=True)
        )
        if not fits:
            wanted = "(" + ", ".join("any" if want is None else str(want) for want in shape) + ")"
            raise InputError(f"{self.path}: array '{key}' has shape {found.shape}, but must have {wanted}")
        return found

    def integers(self, key: str, *shape: int | None, below: int | None = None) -> np.ndarray:
        """Reads whole numbers from 0 on, of a given shape.

        Args:
            key: The array's key.
            *shape: The length of each axis; None allows any.
            below: All numbers must be smaller; None sets no bound.

        Returns:
            The array.

        Raises:
            InputError: If the array is missing, of another shape or type, or out of bounds.
        """
        found = self.array(key, *shape)
        if found.dtype.kind == "f" or (
            found.size and (found.min() < 0 or (below is not None and found.max() >= below))
        ):
            bound = "" if below is None else f" below {below}"
            raise InputError(f"{self.path}: array '{key}' must hold whole numbers from 0{bound}")
        return found

    def scalar(self, key: str) -> float:
        """Reads a single number.

        Args:
            key: The array's key.

        Returns:
            The number.

        Raises:
            InputError: If the array is missing or anything else.
        """
        found = self.raw(key)
        if found.size != 1:
            raise InputError(f"{self.path}: array '{key}' has shape {found.shape}, but must be a single number")
        return float(self.array(key, *found.shape).reshape(()))

    def text(self, key: str) -> str:
        """Reads a single string.

        Args:
            key: The array's key.

        Returns:
            The string.

        Raises:
            InputError: If the array is missing or anything else.
        """
        found = self.raw(key)
        if found.dtype.kind != "U" or found.size != 1:
            raise InputError(f"{self.path}: array '{key}' must be a single string")
        return str(found.reshape(()))

    def flat(self, key: str, size: int) -> np.ndarray:
        """Reads numbers in any shape, flattened (the references keep broadcast shapes).

        Args:
            key: The array's key.
            size: How many numbers it must hold.

        Returns:
            The numbers [size].

        Raises:
            InputError: If the array is missing, not of numbers, or of another size.
        """
        found = self.raw(key)
        if found.size != size:
            raise InputError(f"{self.path}: array '{key}' has {found.size} values {found.shape}, but needs {size}")
        return self.array(key, *found.shape).reshape(-1)


@dataclass(frozen=True)
class Recording(ArrayFile):
    """A result file: the results of a reference's run, and `meta`, which says how to repeat it.

    Attributes:
        meta: The fields of `meta`.
        kind: The kind of result ("quantized", "search", "losses").
        reference: The published code that produced it ("evol-q").
    """

    meta: Meta
    kind: str
    reference: str


def read_recording(path: Path, references: Mapping[str, Sequence[str]]) -> Recording:
    """Reads a result file.

    Args:
        path: The file.
        references: By kind, the references that can be compared.

    Returns:
        The recording.

    Raises:
        InputError: For another format, version, kind or reference.
    """
    arrays = read_arrays(path)
    if "meta" not in arrays:
        raise InputError(f"{path} lacks the array 'meta'; is it a result file of the interchange format? {_REMEDY}")
    text = ArrayFile(path, arrays).text("meta")
    try:
        fields = json.loads(text)
    except ValueError as error:
        raise InputError(f"{path}: meta is not JSON ({one_line(error)})") from error
    if not isinstance(fields, dict):
        raise InputError(f"{path}: meta must be a JSON object; {_REMEDY}")
    meta = Meta(path, fields)
    version = meta._get("format")
    if version != FORMAT or isinstance(version, bool):
        raise InputError(f"{path}: meta.format is {version!r}; this program reads version {FORMAT}")
    kind = meta.choice("kind", tuple(references))
    reference = meta.choice("reference", references[kind])
    return Recording(path, arrays, meta, kind, reference)
