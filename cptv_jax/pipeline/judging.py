"""The judges of candidates: the evaluator, the teacher's outputs, the held-out loss."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from cptv_jax.config.schema import ComputeConfig
from cptv_jax.data import Images
from cptv_jax.pipeline.plan import SearchPlan, Split
from cptv_jax.progress import bar
from cptv_jax.quantized.execution import FullPrecision, Simulated, Unrounded
from cptv_jax.quantized.model import Model, QuantizedModel
from cptv_jax.runtime.forward import activation_bytes, compute_outputs
from cptv_jax.runtime.mesh import make_mesh, pieces_at_once
from cptv_jax.runtime.stages import Output, Stage
from cptv_jax.search import Evaluator, Objective, RacingEvaluator

_GIB = 2**30


@dataclass(frozen=True)
class Judges:
    """The two losses that a search asks for.

    Attributes:
        evaluator: Computes losses of candidates.
        held_out_loss: Loss of stages on the held-out images; None if no images are held out.
    """

    evaluator: Evaluator
    held_out_loss: Callable[[Sequence[Stage]], float] | None


def outputs_of(
    stages: Sequence[Stage], batches: Sequence[Images], compute: ComputeConfig, progress: bool, label: str
) -> list[Output]:
    """Computes the outputs of a model's stages.

    Args:
        stages: The stages of a whole model.
        batches: Images.
        compute: Bounds on memory.
        progress: Whether to show a bar.
        label: Label of the bar.

    Returns:
        The output for each batch, in float32 on the host.
    """
    with bar(label, sum(len(batch) for batch in batches), progress) as shown:
        return [
            compute_outputs(stages, batch.normalize, len(batch), budget=_budget(compute), on_progress=shown.update)
            for batch in batches
        ]


def _budget(compute: ComputeConfig) -> float | None:
    return None if compute.memory_gib is None else compute.memory_gib * _GIB


def teacher_stages(
    teacher: Model, base: QuantizedModel, search: SearchPlan, approximate: bool = False
) -> Sequence[Stage]:
    """Builds the stages of the model that the quantized model is compared with.

    Args:
        teacher: The float model.
        base: The quantized model, whose unrounded pass is the published teacher.
        search: The plan, which chooses between the two.
        approximate: Whether the float model may be computed approximately.

    Returns:
        The stages.
    """
    return base.stages(Unrounded()) if search.teacher == "published" else teacher.stages(FullPrecision(approximate))


def evaluator_of(
    stages: Sequence[Stage],
    batches: Sequence[Images],
    targets: Sequence[Output],
    objective: Objective,
    compute: ComputeConfig,
    candidates: int,
    mesh: Mesh,
) -> Evaluator:
    """Builds the evaluator of a search.

    Args:
        stages: The stages of the quantized model.
        batches: Images that judge.
        targets: The teacher's output for each batch.
        objective: The objective that judges.
        compute: Bounds on memory.
        candidates: How many candidates are evaluated in a round.
        mesh: Divides candidates and images among devices.

    Returns:
        The evaluator, within these bounds.
    """
    images, width = pieces_at_once(
        mesh,
        activation_bytes(stages, jax.ShapeDtypeStruct((1, *batches[0].pixels.shape[1:]), jnp.float32)),
        sum(len(batch) for batch in batches),
        candidates,
        _budget(compute),
    )
    return (RacingEvaluator if compute.race else Evaluator)(
        stages,
        [batch.normalize(0, len(batch)) for batch in batches],
        targets,
        objective,
        compute.images_at_once or images,
        compute.candidates_at_once or width,
        mesh,
        cache_bytes=compute.cache_gib * _GIB,
    )


def make_judges(teacher: Model, base: QuantizedModel, split: Split, search: SearchPlan, progress: bool) -> Judges:
    """Builds the evaluator and the held-out loss of a search.

    Args:
        teacher: The float model.
        base: The quantized model.
        split: The images.
        search: The plan of the search.
        progress: Whether to show a bar.

    Returns:
        The judges.
    """
    stages = base.stages(Simulated(search.compute.arithmetic), search.space)
    searched = split.calibration[: split.searched]
    taught = teacher_stages(teacher, base, search)
    targets = outputs_of(taught, [*searched, *split.held_out], search.compute, progress, "teacher outputs")
    loss_of = jax.jit(search.objective)

    def held_out_loss(current: Sequence[Stage]) -> float:
        found = outputs_of(current, split.held_out, search.compute, False, "held-out images")
        pairs = zip(found, targets[len(searched) :], strict=True)
        return float(np.mean([float(loss_of(output, target)) for output, target in pairs]))

    mesh = make_mesh(search.compute.population_devices)
    evaluator = evaluator_of(
        stages, searched, targets[: len(searched)], search.objective, search.compute, search.strategy.candidates, mesh
    )
    return Judges(evaluator, held_out_loss if split.held_out else None)
