"""Every core can be a device, if it is asked for before JAX starts."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]


def run(code: str, **changes: str) -> tuple[int, str, str]:
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", **changes}
    patched = f"import os; os.sched_getaffinity = lambda process: {{0, 1, 2}}\n{code}"  # a machine of three cores
    done = subprocess.run([sys.executable, "-c", patched], env=environment, capture_output=True, text=True)
    return done.returncode, done.stdout.strip(), done.stderr


USE = "import cptv_jax; cptv_jax.use_all_cores()\n"
COUNT = "import jax; print(jax.device_count())"


@pytest.mark.parametrize(
    ("code", "environment", "devices"),
    [
        (USE + COUNT, {}, "3"),
        (f"{USE}{COUNT}; cptv_jax.use_all_cores()", {}, "3"),  # a second time there is nothing to change
        (f"import jax; jax.config.update('jax_num_cpu_devices', 2)\n{USE}{COUNT}", {}, "2"),
        (USE + COUNT, {"XLA_FLAGS": "--xla_force_host_platform_device_count=4"}, "4"),
        (f"del os.sched_getaffinity; os.cpu_count = lambda: 5\n{USE}{COUNT}", {}, "5"),
    ],
    ids=["before", "twice", "chosen", "flag", "no affinities"],
)
def test_cores_become_devices_unless_somebody_chose(code: str, environment: dict[str, str], devices: str) -> None:
    status, out, err = run(code, **environment)
    assert (status, out) == (0, devices), err


def test_after_jax_has_started_it_says_so() -> None:
    code, _, err = run(f"import jax; jax.devices()\n{USE}")
    assert code == 1
    says = "JAX has started already, with 1 CPU device(s) for 3 cores; call cptv_jax.use_all_cores() before anything"
    assert says in err
