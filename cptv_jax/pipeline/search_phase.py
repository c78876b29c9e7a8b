"""The search phase of a run."""

from collections.abc import Callable
from typing import Any

from cptv_jax.pipeline.judging import make_judges
from cptv_jax.pipeline.plan import SearchPlan, Split
from cptv_jax.pipeline.proposers import make_proposers
from cptv_jax.progress import bar
from cptv_jax.quantized.model import Model, QuantizedModel
from cptv_jax.search.loop import Hooks, Search, run_search
from cptv_jax.search.state import SearchState, initial_state
from cptv_jax.storage.run_directory import RunDirectory


class Meter:
    """Drives a search's progress bar: a step of the bar is a candidate or an optimizer step.

    A pass that ends early completes its share, so that the bar is full at the end of the search.

    Args:
        search: The settings of the search.
        stages: How many stages are searched.
        shown: The bar.
    """

    def __init__(self, search: Search, stages: int, shown: Any) -> None:
        self._a_stage = search.strategy.rounds * search.strategy.candidates
        self._proposals = [proposer.steps for proposer in search.proposers]
        self._a_pass = stages * self._a_stage + sum(self._proposals)
        self._shown, self._done = shown, 0
        shown.total = search.strategy.passes * self._a_pass

    def place(self, state: SearchState) -> None:
        """Moves the bar to the present position of a search.

        Args:
            state: The state of the search.
        """
        done = state.pass_index * self._a_pass + sum(self._proposals[: state.proposed])
        self._to(done + state.position * self._a_stage + int(state.progress.get("done", 0)))

    def finish(self) -> None:
        """Fills the bar."""
        self._to(self._shown.total)

    def count(self, text: str, steps: int) -> None:
        """Shows a text and advances the bar.

        Args:
            text: The text to show next to the bar.
            steps: Number of steps to advance.
        """
        self._shown.set_postfix_str(text)
        self._to(self._done + steps)

    def _to(self, done: int) -> None:
        self._shown.update(done - self._done)
        self._done = done


def improve(
    teacher: Model, base: QuantizedModel, split: Split, plan: SearchPlan, run: RunDirectory | None, progress: bool
) -> tuple[QuantizedModel, SearchState]:
    """Improves a base method's model by the planned search.

    Args:
        teacher: The float model.
        base: The base method's model.
        split: The images.
        plan: The plan of the search.
        run: The run directory, where the search is saved after every stage and continued from; None saves nothing.
        progress: Whether to show a bar.

    Returns:
        The model with the best scales of the search, and the search's last state.
    """
    judges = make_judges(teacher, base, split, plan, progress)
    evaluator = judges.evaluator
    state = (run.state() if run else None) or initial_state(evaluator)
    proposers = make_proposers(teacher, base, split, plan, evaluator)
    search = Search(plan.strategy, plan.key, proposers, judges.held_out_loss, plan.patience, plan.widths)
    save: Callable[[SearchState], None] = run.save_state if run else lambda state: None
    with bar("search", 0, progress) as shown:
        meter = Meter(search, len(state.scales), shown)
        meter.place(state)
        evaluator.on_refresh = lambda done, total: shown.set_postfix_str(f"stage inputs, batch {done} of {total}")

        def on_stage(state: SearchState) -> None:
            save(state)
            meter.place(state)

        hooks = Hooks(
            lambda stage, evaluated, best: meter.count(f"{stage} loss {best:.5f}", evaluated),
            meter.count,
            on_stage,
        )
        state = run_search(evaluator, search, state, hooks)
        meter.finish()
    if state.best_pass == 0:
        return base, state
    return base.with_candidates(state.best_scales), state
