"""Losses are the same bits on one device, on several, and on several processes."""

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from cptv_jax.runtime.mesh import make_mesh, pieces_at_once, rows_at_once

CHILD = Path(__file__).with_name("mesh_child.py")
SECONDS = 300


def start(golden: Path, devices: int, *arguments: str) -> subprocess.Popen[str]:
    environment = os.environ | {
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(Path(__file__).parents[2]),
    }
    command = [sys.executable, str(CHILD), str(golden), *arguments]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def losses_of(process: subprocess.Popen[str]) -> dict[str, list[str]]:
    """By mesh, what a child printed."""
    output, errors = process.communicate(timeout=SECONDS)
    assert process.returncode == 0, errors[-2000:]
    # Gloo speaks up in between: "Rank 0 is connected ...", in lines that two of its threads may write into each other.
    lines = [line.split() for line in output.splitlines() if re.match(r"\d+x\d+ ", line)]
    return {name: values for name, *values in lines}


@pytest.mark.slow
def test_losses_are_the_same_bits_on_every_mesh_and_on_two_processes(golden: Path) -> None:
    names = ("1x1", "1x2", "2x2", "4x2", "1x8")
    single = losses_of(start(golden, 8, *names))
    assert set(single) == set(names) and len(single["1x1"]) == 16 == len(set(single["1x1"]))
    for name, values in single.items():
        assert values == single["1x1"], name
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    processes = [start(golden, 2, "2x2", "--process", str(i), "of", "2", port) for i in range(2)]
    for found in [losses_of(process) for process in processes]:
        assert found == {"2x2": single["1x1"]}


def test_a_mesh_needs_its_devices() -> None:
    count = jax.device_count()
    assert dict(make_mesh().shape) == {"population": 1, "data": count}
    with pytest.raises(ValueError, match=f"mesh of 2 x {count} devices asked for; there are {count}"):
        make_mesh(2, count)
    with pytest.raises(ValueError, match="0 x"):
        make_mesh(0, 1)


def test_pieces_grow_with_the_budget_and_not_with_the_work() -> None:
    mesh = make_mesh(1, 1)
    for images, candidates in ((10, 1), (1000, 16), (10**6, 10**3)):
        for budget in (1.0, 50.0, 1000.0):
            at_once, width = pieces_at_once(mesh, 10, images, candidates, budget)
            assert 1 <= at_once <= images and 1 <= width <= candidates
            assert at_once * width * 10 <= max(budget, 10)  # one row is the least
    assert rows_at_once(10**9, 1.0) == 1
