"""The search phase of a run."""

from collections.abc import Callable, Sequence

import jax
from jaxtyping import PyTree

from cptv_jax.config.schema import QuantizeConfig, SearchConfig, effort
from cptv_jax.pipeline.judging import _children, _judges
from cptv_jax.pipeline.plan import Split
from cptv_jax.pipeline.proposers import _openings, _proposer
from cptv_jax.progress import bar
from cptv_jax.quantized.model import Model, QuantizedModel
from cptv_jax.quantizers import move_candidate
from cptv_jax.search import (
    EvolQ,
    Evosax,
    Generational,
    Guided,
    Strategy,
)
from cptv_jax.search.loop import run_search
from cptv_jax.search.state import Progress, Proposal, Scales, SearchState, initial_state
from cptv_jax.search.strategies.evol_q import published_step
from cptv_jax.storage.run_directory import RunDirectory

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
    return base.with_candidates(state.best_scales), state
