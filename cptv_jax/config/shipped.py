"""The configurations that come with the package, by name."""

from pathlib import Path

from cptv_jax.errors import InputError, did_you_mean

_FOLDER = Path(__file__).resolve().parent.parent / "configs"


def names() -> tuple[str, ...]:
    """Returns the names of the shipped configurations, sorted."""
    return tuple(sorted(path.stem for path in _FOLDER.glob("*.yaml")))


def path_of(name: str) -> Path:
    """Returns the file of a shipped configuration.

    Args:
        name: one of `names()`.

    Raises:
        InputError: there is no such configuration.
    """
    if name not in names():
        raise InputError(f"there is no shipped configuration {name}{did_you_mean(name, names())}")
    return _FOLDER / f"{name}.yaml"


def find_config(given: str) -> Path:
    """Returns the file that a word for a configuration means: a path, or the name of a shipped configuration.

    Args:
        given: a path; a word without a suffix and a folder that is no file here is a name.

    Raises:
        InputError: it is such a word, and no shipped configuration has this name.
    """
    path = Path(given)
    return path if path.suffix or path.name != given or path.exists() else path_of(given)


def summary_of(name: str) -> str:
    """Returns the first comment line of a shipped configuration, which says what it is for."""
    return path_of(name).read_text(encoding="utf-8").partition("\n")[0].removeprefix("#").strip()
