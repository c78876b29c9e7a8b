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
_CPU_ROWS = 10  # images times candidates that a core computes at once; more would not fit its caches
_MEMORY_SHARE = 0.5  # the share of an accelerator's memory that activations may take


def use_all_cores() -> None:
    """Makes every CPU core a device of its own; call it before JAX computes anything.

    XLA's CPU backend runs most operations on one core; two programs side by side keep two cores busy. Losses and
    logits are the same bits on any number of devices. A number of devices that was chosen already
    (`jax_num_cpu_devices`, or `xla_force_host_platform_device_count` in XLA_FLAGS) stays. The command line calls this
    by itself; on accelerators it changes nothing that matters.

    Raises:
        InputError: If JAX has started with fewer devices, because nothing can be changed in this process any more.

    Example:
        >>> import cptv_jax
        >>> cptv_jax.use_all_cores()
        >>> import jax
        >>> jax.device_count()  # on a machine of two cores
        2
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    chosen = "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
    if chosen or jax.config.jax_num_cpu_devices not in (-1, 1):  # type: ignore[attr-defined]
        return
    try:
        jax.config.update("jax_num_cpu_devices", cores)
    except RuntimeError:
        found = len(jax.local_devices(backend="cpu"))
        if found < cores:
            raise InputError(
                f"JAX has started already, with {found} CPU device(s) for {cores} cores; "
                "call cptv_jax.use_all_cores() before anything that computes"
            ) from None


def stay_on_cpu() -> None:
    """Keeps this process off accelerators, so that their memory is left to its children; call it before JAX starts."""
    jax.config.update("jax_platforms", "cpu")


def share_accelerator(processes: int) -> dict[str, str]:
    """Divides an accelerator's memory among several processes.

    A process takes three quarters of an accelerator's memory when JAX starts, so several would not fit.

    Args:
        processes: How many processes use the accelerator at once.

    Returns:
        The environment variables to set for each process; none for a single process.
    """
    return {"XLA_PYTHON_CLIENT_MEM_FRACTION": f"{0.9 / processes:.4f}"} if processes > 1 else {}


def _mesh(population: int, devices: list[jax.Device]) -> Mesh:
    shape = (population, len(devices) // population)
    return jax.make_mesh(shape, (POPULATION, DATA), axis_types=(AxisType.Auto,) * 2, devices=devices)


def make_mesh(population: int = 1, data: int | None = None) -> Mesh:
    """Makes a mesh of population x data devices.

    Args:
        population: Groups of devices that divide the candidates.
        data: Devices per group, which divide the images; None takes as many as there are for each group.

    Returns:
        The mesh, of the first devices; devices that do not fill a whole group are left out.

    Raises:
        ValueError: If there are too few devices.
    """
    data = jax.device_count() // population if data is None else data
    if population < 1 or data < 1 or population * data > jax.device_count():
        raise ValueError(f"a mesh of {population} x {data} devices asked for; there are {jax.device_count()}")
    return _mesh(population, jax.devices()[: population * data])


def check_population(groups: int) -> None:
    """Checks that there is a device for each group.

    Args:
        groups: Groups of devices that divide the candidates.

    Raises:
        InputError: If there are more groups than devices.
    """
    if groups > jax.device_count():
        raise InputError(
            f"search.compute.population_devices is {groups}, but there are {jax.device_count()} devices; "
            f"set search.compute.population_devices to at most {jax.device_count()}"
        )


def local_mesh(images: int) -> Mesh:
    """Makes a mesh of this process's own devices along the data axis.

    Args:
        images: How many images the devices share.

    Returns:
        A mesh of n devices, where n is the greatest common divisor of images and devices: every device gets the same
        number of images. (6 images on 4 devices make a mesh of 2, although 3 would divide the images too.)
    """
    devices = jax.local_devices()[: math.gcd(images, jax.local_device_count())]
    return _mesh(1, devices)


def place(mesh: Mesh, tree: PyTree, axis: str | None = None, position: int = 0) -> PyTree:
    """Places arrays on the devices of a mesh.

    Args:
        mesh: The mesh.
        tree: Arrays; every process holds all of them whole.
        axis: The axis of the mesh, POPULATION or DATA, whose devices divide the arrays; None copies them to every
            device.
        position: The axis of the arrays that is divided; its length must be a multiple of the number of devices.

    Returns:
        The arrays, sharded.
    """
    sharding = NamedSharding(mesh, PartitionSpec(*[None] * position, axis) if axis else PartitionSpec())
    if not sharding.is_fully_addressable:  # several processes, each of which holds the whole tree
        tree = jax.tree.map(np.asarray, tree)
    return jax.device_put(tree, sharding)


def replicated_sharding(mesh: Mesh) -> NamedSharding:
    """Makes the sharding of arrays that every device of a mesh holds whole.

    Args:
        mesh: The mesh.

    Returns:
        The sharding.
    """
    return NamedSharding(mesh, PartitionSpec())


def gather(mesh: Mesh, tree: PyTree) -> PyTree:
    """Brings arrays that are divided among a mesh to the host, whole, in every process.

    Args:
        mesh: The mesh.
        tree: Arrays on the mesh.

    Returns:
        NumPy arrays.
    """
    if not replicated_sharding(mesh).is_fully_addressable:
        tree = jax.jit(lambda x: x, out_shardings=replicated_sharding(mesh))(tree)
    return jax.tree.map(np.asarray, tree)


@cache
def compiler_options() -> dict[str, Any]:
    """Chooses the options of jax.jit for the programs that take most of the time.

    XLA's CPU compiler vectorizes to 256 bits by default. Wider vectors change the order of float sums, so a program's
    results hold for its options.

    Returns:
        The options for the default backend: wider vectors on a CPU, none elsewhere.
    """
    return {"xla_cpu_prefer_vector_width": 512} if jax.default_backend() == "cpu" else {}


def activation_budget() -> float | None:
    """Measures how many bytes activations may take on one device.

    Returns:
        Half of an accelerator's memory (8 GiB are assumed where it does not report its memory); None on a CPU, where
        the caches set the size of a piece of work.
    """
    device = jax.local_devices()[0]
    if device.platform == "cpu":
        return None
    statistics = device.memory_stats() or {}
    return _MEMORY_SHARE * statistics.get("bytes_limit", 8 * 2**30)


def rows_at_once(bytes_per_row: int, budget: float | None = None) -> int:
    """Computes how many rows (images times candidates) one device computes at once.

    Args:
        bytes_per_row: Bytes of one image's activations.
        budget: Bytes for activations; None asks the device.

    Returns:
        At least 1; on a CPU no more than fit into a core's caches, whatever the budget.
    """
    found = activation_budget()
    limit = budget if budget is not None else found
    rows = _CPU_ROWS if found is None else 2**62
    return max(1, rows if limit is None else min(rows, int(limit // max(1, bytes_per_row))))


def images_per_device(mesh: Mesh, bytes_per_row: int, images: int, budget: float | None = None) -> int:
    """Computes how many images each device of the data axis computes at once.

    On CPU devices the number is that of a single device, so that a float model's sums are taken in the same order
    whatever the mesh; a piece of work may then be larger than the images, and is padded. On accelerators the images are
    shared out evenly.

    Args:
        mesh: The mesh.
        bytes_per_row: Bytes of one image's activations.
        images: How many images there are.
        budget: Bytes for activations on each device; None asks the device.

    Returns:
        Images per device.
    """
    rows = rows_at_once(bytes_per_row, budget)
    return min(rows, images if activation_budget() is None else -(-images // mesh.shape[DATA]))


def pieces_at_once(
    mesh: Mesh, bytes_per_row: int, images: int, candidates: int, budget: float | None = None
) -> tuple[int, int]:
    """Computes how many images and candidates a whole mesh computes at once.

    Images come first: all candidates of a piece of images read the same input, and pieces of all images need one call.

    Args:
        mesh: The mesh.
        bytes_per_row: Bytes of one image's activations.
        images: How many images there are.
        candidates: How many candidates there are.
        budget: Bytes for activations on each device; None asks the device.

    Returns:
        Images and candidates, multiples of the mesh's two axes; where they exceed the actual numbers, these are padded.
    """
    rows = rows_at_once(bytes_per_row, budget)
    each = min(rows, -(-images // mesh.shape[DATA]))
    width = min(max(1, rows // each), -(-candidates // mesh.shape[POPULATION]))
    return each * mesh.shape[DATA], width * mesh.shape[POPULATION]
