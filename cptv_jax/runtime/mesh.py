"""Devices: how arrays are divided among them and how much fits on one."""

import math
import os
from functools import cache
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

from cptv_jax.errors import InputError

POPULATION, DATA = "population", "data"
_CPU_ROWS = 10  # images times candidates that a core computes at once: more of them fall out of its caches
_MEMORY_SHARE = 0.5  # of an accelerator's memory, for activations


def use_all_cores() -> None:
    """Makes every CPU core a device of its own, where JAX has not started yet and nobody has chosen otherwise.

    XLA's CPU backend runs most operations on one core; two programs side by side keep two cores busy.
    """
    chosen = "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
    if chosen or jax.config.jax_num_cpu_devices not in (-1, 1):  # type: ignore[attr-defined]
        return
    try:
        jax.config.update("jax_num_cpu_devices", len(os.sched_getaffinity(0)))
    except (RuntimeError, AttributeError):  # JAX has started; or this system has no affinities
        return


def stay_on_cpu() -> None:
    """Keeps this process off accelerators, where JAX has not started yet: the memory there is for its children."""
    jax.config.update("jax_platforms", "cpu")


def shared_by(processes: int) -> dict[str, str]:
    """Environment of each of so many processes that use an accelerator at once: JAX takes 3/4 of it for one alone."""
    return {"XLA_PYTHON_CLIENT_MEM_FRACTION": f"{0.9 / processes:.4f}"} if processes > 1 else {}


def _mesh(population: int, devices: list[jax.Device]) -> Mesh:
    shape = (population, len(devices) // population)
    return jax.make_mesh(shape, (POPULATION, DATA), axis_types=(AxisType.Auto,) * 2, devices=devices)


def make_mesh(population: int = 1, data: int | None = None) -> Mesh:
    """A mesh of population x data devices; data None takes all that are left over.

    Raises ValueError where there are too few devices.
    """
    data = jax.device_count() // population if data is None else data
    if population < 1 or data < 1 or population * data > jax.device_count():
        raise ValueError(f"a mesh of {population} x {data} devices asked for; there are {jax.device_count()}")
    return _mesh(population, jax.devices()[: population * data])


def check_population(groups: int) -> None:
    """Raises InputError for more groups of devices than there are devices."""
    if groups > jax.device_count():
        raise InputError(
            f"search.compute.population_devices is {groups}, but there are {jax.device_count()} devices; "
            f"set search.compute.population_devices to at most {jax.device_count()}"
        )


def local_mesh(images: int) -> Mesh:
    """A mesh of this process's own devices along the data axis: as many as divide so many images evenly."""
    devices = jax.local_devices()[: math.gcd(images, jax.local_device_count())]
    return _mesh(1, devices)


def place(mesh: Mesh, tree: PyTree, axis: str | None = None, position: int = 0) -> PyTree:
    """Arrays on the devices of a mesh: their axis at `position` divided among one of it, or copied to every device."""
    sharding = NamedSharding(mesh, PartitionSpec(*[None] * position, axis) if axis else PartitionSpec())
    if not sharding.is_fully_addressable:  # several processes, each of which holds the whole tree
        tree = jax.tree.map(np.asarray, tree)
    return jax.device_put(tree, sharding)


def replicated(mesh: Mesh) -> NamedSharding:
    """For what every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def gather(mesh: Mesh, tree: PyTree) -> PyTree:
    """Arrays that are divided among a mesh, whole and on the host, in every process."""
    if not replicated(mesh).is_fully_addressable:
        tree = jax.jit(lambda x: x, out_shardings=replicated(mesh))(tree)
    return jax.tree.map(np.asarray, tree)


@cache
def compiler_options() -> dict[str, Any]:
    """Options of jax.jit for the programs that take the time, on the present backend.

    XLA's CPU compiler vectorizes to 256 bits unless told otherwise.
    """
    return {"xla_cpu_prefer_vector_width": 512} if jax.default_backend() == "cpu" else {}


def activation_budget() -> float | None:
    """Bytes of a device that activations may take; None on a CPU, where the caches set the size of a piece of work."""
    device = jax.local_devices()[0]
    if device.platform == "cpu":
        return None
    statistics = device.memory_stats() or {}
    return _MEMORY_SHARE * statistics.get("bytes_limit", 8 * 2**30)


def rows_at_once(bytes_a_row: int, budget: float | None = None) -> int:
    """Images times candidates that one device computes at once.

    bytes_a_row: activations of one image. budget: bytes for activations; None asks the device.
    """
    found = activation_budget()
    limit = budget if budget is not None else found
    rows = _CPU_ROWS if found is None else 2**62
    return max(1, rows if limit is None else min(rows, int(limit // max(1, bytes_a_row))))


def images_each(mesh: Mesh, bytes_a_row: int, images: int, budget: float | None = None) -> int:
    """How many of so many images each device of the data axis computes at once; arguments as of rows_at_once.

    On CPU devices always as many as on one alone, so that a float model's sums are taken in the same order whatever
    the mesh; on accelerators the images are shared out evenly.
    """
    rows = rows_at_once(bytes_a_row, budget)
    return min(rows, images if activation_budget() is None else -(-images // mesh.shape[DATA]))


def pieces_at_once(
    mesh: Mesh, bytes_a_row: int, images: int, candidates: int, budget: float | None = None
) -> tuple[int, int]:
    """Images and candidates to compute at once on a whole mesh, for so many in all; arguments as of rows_at_once.

    Images first: all candidates of a piece of images read the same input, and pieces of all images need one call.
    """
    rows = rows_at_once(bytes_a_row, budget)
    each = min(rows, -(-images // mesh.shape[DATA]))
    width = min(max(1, rows // each), -(-candidates // mesh.shape[POPULATION]))
    return each * mesh.shape[DATA], width * mesh.shape[POPULATION]
