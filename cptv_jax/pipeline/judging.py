"""What judges candidates: the evaluator, the teacher's outputs, the held-out loss."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from cptv_jax.config.schema import QuantizeConfig, SearchConfig, effort, objectives
from cptv_jax.data import Images
from cptv_jax.pipeline.plan import Split, searched_sites
from cptv_jax.progress import bar
from cptv_jax.quantized.candidate import Space
from cptv_jax.quantized.execution import FullPrecision, Simulated, Unrounded
from cptv_jax.quantized.model import Model, QuantizedModel
from cptv_jax.runtime.forward import activation_bytes, outputs
from cptv_jax.runtime.mesh import make_mesh, pieces_at_once
from cptv_jax.runtime.stages import Output, Stage
from cptv_jax.search import (
    Evaluator,
    Objective,
    RacingEvaluator,
)

_GIB = 2**30


def _children(config: SearchConfig) -> int:
    """Candidates a round."""
    return 1 if config.strategy == "evol-q" else effort(config).children


@dataclass(frozen=True)
class _Judges:
    """What a search asks about candidates and stages.

    mesh: that the images are divided on.
    """

    evaluator: Evaluator
    held_out_loss: Callable[[Sequence[Stage]], float] | None
    mesh: Mesh


def outputs_of(
    stages: Sequence[Stage], batches: Sequence[Images], search: SearchConfig, progress: bool, label: str
) -> list[Output]:
    """The output for each batch, in float32 on the host."""
    with bar(label, sum(len(batch) for batch in batches), progress) as shown:
        return [
            outputs(stages, batch.normalized, len(batch), budget=_budget(search), on_progress=shown.update)
            for batch in batches
        ]


def _budget(search: SearchConfig) -> float | None:
    return None if search.memory_gib is None else search.memory_gib * _GIB


def searched_space(base: QuantizedModel, search: SearchConfig) -> Space:
    """What of a model a configured search moves."""
    return Space(searched_sites(base.recipe, search), offsets=bool(search.offsets), rounding=bool(search.rounding))


def _teacher_stages(
    teacher: Model, base: QuantizedModel, search: SearchConfig, approximate: bool = False
) -> Sequence[Stage]:
    """What the quantized model is compared with. approximate: it need not be exact."""
    return base.stages(Unrounded()) if search.teacher == "published" else teacher.stages(FullPrecision(approximate))


def evaluator_of(
    stages: Sequence[Stage],
    batches: Sequence[Images],
    targets: Sequence[Output],
    objective: Objective,
    search: SearchConfig,
    candidates: int,
    mesh: Mesh,
) -> Evaluator:
    """The evaluator of so many candidates a round, within the bounds on memory that the search has.

    targets: the teacher's output for each batch.
    """
    images, width = pieces_at_once(
        mesh,
        activation_bytes(stages, jax.ShapeDtypeStruct((1, *batches[0].pixels.shape[1:]), jnp.float32)),
        sum(len(batch) for batch in batches),
        candidates,
        _budget(search),
    )
    return (RacingEvaluator if search.race else Evaluator)(
        stages,
        [batch.normalized(0, len(batch)) for batch in batches],
        targets,
        objective,
        search.images_at_once or images,
        search.candidates_at_once or width,
        mesh,
        cache_bytes=search.cache_gib * _GIB,
    )


def _judges(teacher: Model, base: QuantizedModel, split: Split, config: QuantizeConfig, progress: bool) -> _Judges:
    search = config.search
    stages = base.stages(Simulated(search.arithmetic), searched_space(base, search))
    objective, _ = objectives(search)
    searched = split.calibration[: split.searched]
    taught = _teacher_stages(teacher, base, search)
    targets = outputs_of(taught, [*searched, *split.held_out], search, progress, "teacher outputs")
    loss_of = jax.jit(objective)

    def held_out_loss(current: Sequence[Stage]) -> float:
        found = outputs_of(current, split.held_out, search, False, "held-out images")
        pairs = zip(found, targets[len(searched) :], strict=True)
        return float(np.mean([float(loss_of(output, target)) for output, target in pairs]))

    mesh = make_mesh(search.population_devices)
    evaluator = evaluator_of(stages, searched, targets[: len(searched)], objective, search, _children(search), mesh)
    return _Judges(evaluator, held_out_loss if split.held_out else None, mesh)
