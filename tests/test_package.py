"""Importing the package and asking for help load nothing that takes long, and no module needs a POSIX system."""

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import cptv_jax

REPOSITORY = Path(__file__).resolve().parents[1]
ON_USE = ("orbax", "matplotlib", "sklearn", "tensorflow_datasets", "huggingface_hub", "evosax")
HEAVY = (*ON_USE, "jax", "numpy", "flax", "optax", "safetensors", "PIL", "pydantic", "scipy")
POSIX_ONLY = ("fcntl", "resource", "pwd", "grp", "termios", "tty", "pty", "syslog")


def run(code: str, *arguments: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def imported(code: str) -> set[str]:
    """Top-level modules that a fresh process has after some code."""
    ending = "import json, sys; print(json.dumps(sorted({name.partition('.')[0] for name in sys.modules})))"
    return set(json.loads(run(f"{code}\n{ending}").splitlines()[-1]))


@pytest.mark.parametrize(
    "code",
    [
        "import cptv_jax; dir(cptv_jax); cptv_jax.__version__",
        "from cptv_jax import InputError",
        "import contextlib, io, sys\nfrom cptv_jax.cli.main import main\n"
        "with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()): main(['--help'])",
        "import contextlib, io, sys\nfrom cptv_jax.cli.main import main\n"
        "with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()): main(['configs'])",
    ],
    ids=["import", "error", "help", "configs"],
)
def test_neither_an_import_nor_help_loads_what_is_heavy(code: str) -> None:
    assert imported(code) & set(HEAVY) == set()


def test_what_only_some_runs_need_is_imported_by_these() -> None:
    assert imported("from cptv_jax import *") & set(ON_USE) == set()


def test_every_public_name_is_found_and_listed() -> None:
    assert sorted(cptv_jax._EXPORTS) == sorted(cptv_jax.__all__)
    for name in cptv_jax.__all__:
        assert getattr(cptv_jax, name) is not None
        assert name in dir(cptv_jax)
    assert cptv_jax.load_images is cptv_jax.data.load
    with pytest.raises(AttributeError, match="module 'cptv_jax' has no attribute 'quantise'"):
        _ = cptv_jax.quantise


def test_type_checkers_and_the_table_see_the_same_names() -> None:
    tree = ast.parse((REPOSITORY / "cptv_jax" / "__init__.py").read_text(encoding="utf-8"))
    (guarded,) = [node for node in tree.body if isinstance(node, ast.If)]
    seen = {}
    for node in guarded.body:
        assert isinstance(node, ast.ImportFrom) and node.module is not None
        for alias in node.names:
            own = f":{alias.name}" if alias.asname else ""
            seen[alias.asname or alias.name] = node.module.removeprefix("cptv_jax.") + own
    assert seen == cptv_jax._EXPORTS


def test_no_path_of_a_machine_stands_in_a_file_that_is_shipped_or_shown() -> None:
    folder = re.compile(rb"(?<![\w.)*-])/(?:work|home|root|mnt|tmp|Users)/[\w.-]+")
    found = []
    for top in ("README.md", "CHANGELOG.md", "benchmarks", "cptv_jax", "docs", "colab"):
        path = REPOSITORY / top
        for file in [path] if path.is_file() else sorted(path.rglob("*")):
            if file.suffix in (".md", ".json", ".py", ".yaml", ".ipynb"):
                found += [(file.name, match) for match in folder.findall(file.read_bytes())]
    assert found == []


def test_every_module_is_imported_without_what_only_posix_has() -> None:
    run(
        "import sys, importlib, pkgutil\n"
        "import jax, numpy, optax, flax.nnx, filelock, PIL.Image, yaml, tqdm, pydantic, safetensors\n"
        "import tempfile, subprocess, multiprocessing, random, shutil\n"
        "for name in sys.argv[1:]: sys.modules[name] = None\n"
        "import os; del os.sched_getaffinity\n"
        "import cptv_jax\n"
        "for module in pkgutil.walk_packages(cptv_jax.__path__, 'cptv_jax.'): importlib.import_module(module.name)\n",
        *POSIX_ONLY,
    )
