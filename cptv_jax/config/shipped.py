"""The configurations that come with the package, by name."""

from pathlib import Path

from cptv_jax.errors import InputError, did_you_mean

_FOLDER = Path(__file__).resolve().parent.parent / "configs"


def names() -> tuple[str, ...]:
    """Lists the shipped configurations.

    Returns:
        Their names, sorted.
    """
    return tuple(sorted(path.stem for path in _FOLDER.glob("*.yaml")))


def path_of(name: str) -> Path:
    """Finds the file of a shipped configuration.

    Args:
        name: One of `names()`.

    Returns:
        The path of the YAML file.

    Raises:
        InputError: If there is no such configuration.
    """
    if name not in names():
        raise InputError(f"there is no shipped configuration {name}{did_you_mean(name, names())}")
    return _FOLDER / f"{name}.yaml"


def find_config(given: str) -> Path:
    """Finds the file that the user means by a path or by the name of a shipped configuration.

    Args:
        given: A path, or a name. A word without suffix and folder is a name unless a file of that name exists.

    Returns:
        The path of the YAML file.

    Raises:
        InputError: If it is a name, and no shipped configuration has it.
    """
    path = Path(given)
    return path if path.suffix or path.name != given or path.exists() else path_of(given)


def summary_of(name: str) -> str:
    """Reads the first comment line of a shipped configuration, which states its purpose.

    Args:
        name: One of `names()`.

    Returns:
        The line, without the comment sign.
    """
    return path_of(name).read_text(encoding="utf-8").partition("\n")[0].removeprefix("#").strip()
