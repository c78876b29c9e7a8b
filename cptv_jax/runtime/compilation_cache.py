"""JAX's persistent compilation cache: programs that one process compiled are read by the next."""

import hashlib
import os
import platform
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cptv_jax.errors import InputError

OFF = "off"
_DIRECTORY, _ENABLED = "JAX_COMPILATION_CACHE_DIR", "JAX_ENABLE_COMPILATION_CACHE"
_SECONDS, _BYTES = "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"
_EVERY_PROGRAM = {_SECONDS: "0", _BYTES: "-1"}  # by default JAX keeps only those that took a second to compile
_SETTINGS: dict[str, Callable[[str], Any]] = {  # environment variables, and how jax.config takes each
    _DIRECTORY: str,
    _ENABLED: lambda text: text == "true",
    _SECONDS: float,
    _BYTES: int,
}


def use_compilation_cache(choice: str | None = None) -> Path | None:
    """Keeps compiled programs on disk, for this process and its children, from its next program on.

    JAX need not be imported yet. Settings are made as environment variables, which child processes inherit.

    Args:
        choice: A directory, or "off". None keeps the cache that JAX_COMPILATION_CACHE_DIR names, and without that
            variable takes the folder `cptv-jax` of the user's cache directory (XDG_CACHE_HOME). Each kind of processor
            has a folder of its own within the directory, because code for one may crash on another.

    Returns:
        The folder of the programs, or None without a cache.

    Raises:
        InputError: If the requested directory cannot be made.

    Example:
        >>> use_compilation_cache("~/programs")
    """
    if choice == OFF:
        os.environ.pop(_DIRECTORY, None)
        _set({_ENABLED: "false"})
        return None
    if choice is None and os.environ.get(_DIRECTORY):
        return Path(os.environ[_DIRECTORY])
    folder = (user_cache() if choice is None else Path(choice).expanduser().absolute()) / processor_kind()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        if choice is None:  # nobody asked for a cache, so a home that cannot be written must not stop the run
            return None
        raise InputError(
            f"--compilation-cache {choice} cannot be made ({error.strerror}); name another directory, or off"
        ) from None
    given = {name: os.environ.get(name, value) for name, value in _EVERY_PROGRAM.items()}
    _set({_DIRECTORY: str(folder), _ENABLED: "true", **given})
    return folder


def user_cache() -> Path:
    """Returns the folder of this package within the user's cache directory."""
    home = Path.home()
    if sys.platform == "win32":
        usual = Path(os.environ.get("LOCALAPPDATA") or home / "AppData" / "Local")
    elif sys.platform == "darwin":
        usual = home / "Library" / "Caches"
    else:
        usual = home / ".cache"
    chosen = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(chosen) if os.path.isabs(chosen) else usual) / "cptv-jax" / "programs"


def processor_kind() -> str:
    """Returns a name for this machine's kind of processor: its architecture and a digest of its instruction sets."""
    described = platform.processor()
    try:  # on Linux platform.processor() gives only the architecture; this file lists the instructions
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        wanted = ("model name", "flags", "Features", "CPU implementer", "CPU part")
        described += "\n".join(dict.fromkeys(line for line in lines if line.startswith(wanted)))
    except OSError:
        pass
    return f"{platform.machine() or 'unknown'}-{hashlib.sha256(described.encode()).hexdigest()[:12]}"


def _set(variables: dict[str, str]) -> None:
    os.environ.update(variables)
    if "jax" not in sys.modules:
        return  # it reads them when it is imported
    import jax

    for name, convert in _SETTINGS.items():
        if name in variables:
            jax.config.update(name.lower(), convert(variables[name]))
