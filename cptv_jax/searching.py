"""The search phase of a run: what a configuration comes to in evaluators, strategies and proposals."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import PyTree

from cptv_jax.config import QuantizeConfig, SearchConfig, effort, objectives
from cptv_jax.data import Images
from cptv_jax.forward import activation_bytes, array_of, outputs
from cptv_jax.mesh import gradient_arithmetic, make_mesh, pieces_at_once
from cptv_jax.openings import steps_to_least_error, steps_to_least_output_error
from cptv_jax.plan import Split, searched_sites
from cptv_jax.progress import bar
from cptv_jax.quantized import Model, QuantizedModel, move_candidate
from cptv_jax.run_directory import RunDirectory
from cptv_jax.search import (
    Descent,
    Evaluator,
    EvolQ,
    Evosax,
    Generational,
    GradientProposer,
    Guided,
    MatchingLoss,
    Objective,
    RacingEvaluator,
    Strategy,
    channel_variances,
    paired,
)
from cptv_jax.search.run import Opening, Progress, Proposal, Scales, SearchState, initial_state, run_search
from cptv_jax.search.strategies.evol_q import published_step
from cptv_jax.stages import Output, Stage

_GIB = 2**30
_VARIANCE_IMAGES = 100  # that the variances of the teacher's channels are taken from
_ROUNDING_IMAGES = 1000  # that roundings in closed form are fitted on, at most: a stage's inputs for all are in memory
_AT_ONCE = 25  # of them go through a stage
_IDLE_STAGES = 4  # guided: a pass ends after so many in a row that gained nothing over its proposal


def strategy_for(
    config: SearchConfig, weight_bits: int, direction: PyTree = None, sigma: float | None = None
) -> Strategy:
    """The configured strategy for a stage whose searched weights have this width.

    direction: of the pass's proposal there, for guided. sigma: what the stage before ended with, which guided goes on
    with, as it visits a stage for a round or so.
    """
    _, rounds, children = effort(config)
    if config.strategy == "guided":
        return Guided(direction, move_candidate, config.sigma if sigma is None else sigma, children, rounds)
    if config.strategy == "evosax":
        return Evosax(config.algorithm, config.sigma, children, rounds)
    if config.strategy == "evol-q":
        step = published_step(weight_bits) if config.step is None else config.step
        return EvolQ(step, config.population, config.samples, rounds)
    return Generational(config.sigma, children, config.survivors, rounds)


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


def _searched_stages(base: QuantizedModel, search: SearchConfig, differentiable: bool = False) -> Sequence[Stage]:
    """The stages with what is searched as candidates. differentiable: see QuantizedModel.stages."""
    sites = searched_sites(base.recipe, search)
    return base.stages(
        lambda site: site in sites,
        shifted=bool(search.offsets),
        turned=bool(search.rounding),
        arithmetic=search.arithmetic,
        differentiable=differentiable,
    )


def _teacher_stages(
    teacher: Model, base: QuantizedModel, search: SearchConfig, approximate: bool = False
) -> Sequence[Stage]:
    """What the quantized model is compared with. approximate: it need not be exact."""
    return base.stages(rounding=False) if search.teacher == "published" else teacher.stages(approximate=approximate)


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
    stages = _searched_stages(base, search)
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


def _reader(batches: Sequence[Images]) -> tuple[Callable[[np.ndarray], np.ndarray], int]:
    """What reads images by their number, for the first stage, from batches of one size; and how many there are."""
    size = len(batches[0])

    def read(rows: np.ndarray) -> np.ndarray:
        return np.concatenate([batches[row // size].normalized(row % size, row % size + 1) for row in rows])

    return read, size * len(batches)


def _proposer(
    teacher: Model, base: QuantizedModel, split: Split, search: SearchConfig, judges: _Judges
) -> GradientProposer:
    mirrored = [batch.mirrored() for batch in split.calibration] if search.mirror else []
    read, count = _reader([*split.calibration, *mirrored])
    arithmetic = gradient_arithmetic(search.arithmetic)
    taught = _teacher_stages(teacher, base, search, approximate=arithmetic == "bf16-codes")
    few = read(np.arange(min(_VARIANCE_IMAGES, _reader(split.calibration)[1])))
    variances = channel_variances(taught, jnp.asarray(few), array_of) if search.gradient_matching else []
    students = _searched_stages(base, replace(search, arithmetic=arithmetic), differentiable=True)
    return GradientProposer(
        paired(students, taught, array_of, variances),
        read,
        count,
        MatchingLoss(objectives(search).proposing, search.gradient_matching, len(variances)),
        Descent(
            search.gradient_steps, search.gradient_rate, search.gradient_batch, effort(search).passes, search.mixup
        ),
        search.images_at_once or max(1, judges.evaluator.images // 2),  # the derivative takes as much again
        judges.mesh,
    )


def _openings(
    base: QuantizedModel, split: Split, search: SearchConfig, on_work: Callable[[str], None]
) -> list[Opening]:
    """What is tried before the first gradient: grids of least error, then roundings that keep what layers give.

    on_work: told which layer is rounded.
    """

    def rounded_anew(scales: Scales) -> Scales:
        read, count = _reader(split.calibration)
        rows = np.arange(max(0, count - _ROUNDING_IMAGES), count)  # the last ones: others judge, where there are others
        batches = (jnp.asarray(read(rows[start : start + _AT_ONCE])) for start in range(0, len(rows), _AT_ONCE))
        return steps_to_least_output_error(base, scales, batches, lambda layer: on_work(f"rounding {layer}"))

    grids = partial(steps_to_least_error, base)
    return [grids, rounded_anew] if search.rounding else [grids]


def _stage_bits(base: QuantizedModel, stage: str, sites: Sequence[str]) -> int:
    """Width of a stage's searched sites; the last one's where they differ (the published code asks proj)."""
    return [spec.bits for site, spec in base.recipe.of_stage(stage).items() if f"{stage}.{site}" in sites][-1]


def improve(
    teacher: Model,
    base: QuantizedModel,
    split: Split,
    config: QuantizeConfig,
    run: RunDirectory | None,
    progress: bool,
) -> tuple[QuantizedModel, SearchState]:
    """The base method's model with what the configured search found, and how the search ended.

    run: where it is saved after every stage, and continued from.
    """
    search = config.search
    judges = _judges(teacher, base, split, config, progress)
    evaluator = judges.evaluator
    state = (run.state() if run else None) or initial_state(evaluator)
    searched = [f"{name}.{site}" for name, scales in state.scales.items() for site in scales]
    bits = {name: _stage_bits(base, name, searched) for name in state.scales}
    guided = search.strategy == "guided"
    proposer = _proposer(teacher, base, split, search, judges) if guided else None
    passes, rounds, _ = effort(search)
    per_pass = len(bits) * rounds * _children(search) + guided * search.gradient_steps
    done = state.pass_index * per_pass + state.position * rounds * _children(search)
    done += search.gradient_steps if state.proposed else int(state.progress.get("done", 0))
    with bar("search", passes * per_pass, progress, done) as shown:
        evaluator.on_refresh = lambda done, total: shown.set_postfix_str(f"stage inputs, batch {done} of {total}")

        def on_round(stage: str, evaluated: int, best: float) -> None:
            shown.set_postfix_str(f"{stage} loss {best:.5f}")
            shown.update(evaluated)

        def on_step(loss: float) -> None:
            shown.set_postfix_str(f"gradient, batch loss {loss:.5f}")
            shown.update(1)

        def propose(
            scales: Scales, pass_index: int, key: jax.Array, progress: Progress, on_progress: Callable[[Progress], None]
        ) -> Proposal:
            assert proposer is not None
            return proposer.propose(scales, pass_index, key, on_step, progress, on_progress)

        state = run_search(
            evaluator,
            lambda name, direction, sigma: strategy_for(search, bits[name], direction, sigma),
            passes,
            jax.random.key(config.seed),
            state,
            judges.held_out_loss,
            on_round,
            run.save_state if run else lambda state: None,
            propose if guided else None,
            _openings(base, split, search, shown.set_postfix_str) if guided else (),
            search.patience,
            _IDLE_STAGES if guided else None,
        )
    if state.best_pass == 0:
        return base, state
    found = {f"{name}.{key}": value for name, values in state.best_scales.items() for key, value in values.items()}
    return base.with_parameters(found), state
