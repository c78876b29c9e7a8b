"""One run of a bench in a separate process, so that its memory peak and its failure stay its own.

`python -m cptv_jax.bench.worker` reads a task as one line of JSON from stdin and measures it; when stdin ends (its
parent is gone) it ends too.
"""

import json
import math
import os
import sys
import threading
import time
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from cptv_jax import data
from cptv_jax.config.loading import config_from
from cptv_jax.config.schema import QuantizeConfig
from cptv_jax.errors import InputError
from cptv_jax.evaluation import logits_of
from cptv_jax.options import to_mapping
from cptv_jax.pipeline.plan import make_plan
from cptv_jax.pipeline.quantize import quantize
from cptv_jax.plugins import import_plugins
from cptv_jax.report.summary import summarize
from cptv_jax.runtime.mesh import use_all_cores
from cptv_jax.search.objective import info_nce, kl_divergence
from cptv_jax.search.proposals.base import gradient_steps
from cptv_jax.storage.files import versions, write_atomically
from cptv_jax.storage.models import load_float_model

TEMPERATURE = 3.0  # of the objective that all rows are judged by, the published one
_KIB, _MIB = 2**10, 2**20


@dataclass(frozen=True)
class Task:
    """A run to measure.

    Attributes:
        weights: The float model, as `cptv quantize` takes it.
        arch: The timm name; None if the weights tell it.
        images: Calibration images, as `cptv quantize` takes them.
        evaluation: Labelled images.
        held_out: Number of images, beyond those of the configuration, that only the objective is measured on.
        config: The configuration.
        run: The run directory.
        measured: The file that receives the measurements.
    """

    weights: str
    arch: str | None
    images: str
    evaluation: str
    held_out: int
    config: QuantizeConfig
    run: Path
    measured: Path

    def to_json(self) -> str:
        """Writes the task as text.

        Returns:
            One line of JSON, which `from_json` reads.
        """
        config = {"config": to_mapping(self.config), "modules": _users_modules(self.config)}
        return json.dumps({**vars(self), **config}, default=str)  # paths as text

    @classmethod
    def from_json(cls, text: str) -> "Task":
        """Reads a task, and imports the modules that register its method and strategy.

        Args:
            text: One line of JSON.

        Returns:
            The task.
        """
        values = json.loads(text)
        import_plugins()
        for module in values.pop("modules"):
            import_module(module)
        values["config"] = config_from(values["config"], "task")
        for name in ("run", "measured"):
            values[name] = Path(values[name])
        return cls(**values)


def _users_modules(config: QuantizeConfig) -> list[str]:
    """Modules of a user's that define the method or the strategy; importing them has to register these."""
    modules = dict.fromkeys(type(options).__module__ for options in (config.method, config.search.strategy))
    return [module for module in modules if module.partition(".")[0] not in ("cptv_jax", "__main__")]


def read_measured(path: Path) -> dict[str, Any]:
    """Reads a file of measurements.

    Args:
        path: The file.

    Returns:
        Its content so far; empty if it is absent or damaged.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def peak_mib() -> float:
    """Measures the largest resident memory of this process so far.

    Returns:
        MiB; NaN if the platform does not tell.
    """
    try:
        # Not ru_maxrss where this is to be had: Linux starts it at the peak of the process that began this one.
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        return float(next(line for line in lines if line.startswith("VmHWM:")).split()[1]) * _KIB / _MIB
    except (OSError, StopIteration):
        try:
            import resource  # here, not above: Windows has none
        except ImportError:
            return math.nan
        unit = 1 if sys.platform == "darwin" else _KIB
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / _MIB


class Phases:
    """Seconds and peak memory of a run's phases, written down as each begins and ends.

    A phase that an earlier process began and did not end is marked as resumed: its seconds and its peak are those of
    this process alone.

    Args:
        path: The file of measurements.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.found: dict[str, dict[str, Any]] = read_measured(path).get("phases", {})
        self._current: str | None = None
        self._start = 0.0

    def begin(self, name: str) -> None:
        """Ends the phase before, if any, and begins the next.

        Args:
            name: The phase.
        """
        self.end()
        earlier = self.found.get(name, {})
        self.found[name] = {"resumed": bool(earlier)}
        self._current, self._start = name, time.perf_counter()
        self._write()

    def end(self) -> None:
        """Ends the present phase, if any."""
        if self._current is not None:
            self.found[self._current] |= {"seconds": time.perf_counter() - self._start, "peak_mib": peak_mib()}
            self._current = None
            self._write()

    def _write(self) -> None:
        write_atomically(self.path, json.dumps({"phases": self.found}, indent=1))


def measure(task: Task) -> dict[str, Any]:
    """Runs a task to its end; an interrupted one continues.

    Args:
        task: The task.

    Returns:
        The measurements for its row of the table.

    Raises:
        InputError: If the task cannot work.
    """
    model = load_float_model(task.weights, task.arch)
    preprocessing, config = model.architecture.preprocessing, task.config
    wanted = config.calibration.images
    count = wanted + task.held_out
    given = data.load(task.images, preprocessing, labels=False, limit=count, need=count, seed=config.seed)
    evaluation = data.load(task.evaluation, preprocessing, labels=True)
    images, held_out = given.take(slice(0, wanted)), given.take(slice(wanted, count))
    plan = make_plan(model, images, config)
    phases = Phases(task.measured)
    outcome = quantize(model, images, config, out=task.run, evaluation=evaluation, progress=True, on_phase=phases.begin)
    phases.end()
    objective: dict[str, float] = {}
    kl: dict[str, float] = {}
    if task.held_out:
        teacher = jnp.asarray(logits_of(model.stages(), held_out))
        for name, quantized in (("base", outcome.base), ("final", outcome.model)):
            student = jnp.asarray(logits_of(quantized.stages(), held_out))
            objective[name] = float(info_nce(student, teacher, TEMPERATURE))
            kl[name] = float(kl_divergence(student, teacher, 1.0))
    batch, summary = config.calibration.batch, summarize(outcome)
    return {
        "phases": phases.found,
        "accuracy": {name: vars(accuracy) for name, accuracy in outcome.results.items()},
        "objective": objective,
        "kl": kl,
        "recipe": outcome.model.recipe.name,
        "scope": outcome.model.recipe.scope,
        "evaluations": summary.evaluations,
        "gradient_steps": summary.proposals * gradient_steps(config.search.strategy.proposers()),
        "images": {
            "base": plan.base_images,
            "search": plan.split.searched * batch if plan.search else 0,
            "held_out": len(plan.split.held_out) * batch,
        },
        "versions": versions(),
        "config": to_mapping(task.config),
        "done": True,
    }


def _end_with_parent() -> None:
    sys.stdin.read()
    os._exit(1)


def main() -> None:
    """Measures the task on stdin; exits with 2, and the reason in the file of measurements, if it cannot work."""
    task = Task.from_json(sys.stdin.readline())
    threading.Thread(target=_end_with_parent, daemon=True).start()
    use_all_cores()
    try:
        found = measure(task)
    except InputError as error:
        write_atomically(task.measured, json.dumps({**read_measured(task.measured), "refused": str(error)}, indent=1))
        sys.exit(2)
    write_atomically(task.measured, json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
