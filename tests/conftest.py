"""What all tests share: where JAX runs, where it keeps compiled programs, where the data lies."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
_MANY_MAPS = 20_000
_MUCH_MEMORY = 2 * 2**30

# Set before any test imports jax. Environment variables, not jax.config: child processes (the command line, notebooks,
# pytest-xdist workers) inherit them, and whoever runs the tests can override each one. Workers may share the cache:
# an entry is one checksummed file, and jax answers one that it meets half-written by compiling again.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(REPOSITORY / ".jax_cache"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

import hypothesis  # noqa: E402
import jax  # noqa: E402

# The first example of a test compiles, which takes as long as the machine is busy.
hypothesis.settings.register_profile("cptv", deadline=None)
hypothesis.settings.load_profile("cptv")


@pytest.fixture(autouse=True, scope="module")
def room_for_programs() -> Iterator[None]:
    """Drops compiled programs after a module once they take too much; else the next module finds its own among them.

    Too much is memory, or nearly the pieces of it that the kernel allows a process: 65,530 on Linux. What is dropped
    comes back from the cache on disk.
    """
    yield
    statm, maps = Path("/proc/self/statm"), Path("/proc/self/maps")
    if not maps.exists():
        jax.clear_caches()
        return
    resident = int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    if resident > _MUCH_MEMORY or maps.read_bytes().count(b"\n") > _MANY_MAPS:
        jax.clear_caches()


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real weights and photographs that lies beside the repository; without it the test is skipped."""
    folder = Path(os.environ.get("CPTV_SHARED", REPOSITORY.parent / "shared"))
    if not folder.is_dir():
        pytest.skip(f"no shared folder at {folder}; set CPTV_SHARED to run this test")
    return folder


@pytest.fixture(scope="session")
def golden() -> Path:
    """The folder of arrays recorded from published code that the repository carries."""
    return REPOSITORY / "tests" / "golden"
