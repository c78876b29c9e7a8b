"""Files of kind `search`: the published evolution replayed with its recorded draws (step 5)."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from cptv_jax.compare import checks
from cptv_jax.compare.checks import Check
from cptv_jax.compare.interchange import Recording
from cptv_jax.compare.names import sites_by_module
from cptv_jax.compare.quantized import parameter_checks
from cptv_jax.compare.subject import Subject, prepare
from cptv_jax.errors import InputError
from cptv_jax.models.architecture import sites_of
from cptv_jax.quantized.candidate import Space
from cptv_jax.quantized.execution import Simulated, Unrounded
from cptv_jax.quantizers import Free
from cptv_jax.runtime.forward import forward
from cptv_jax.search.evaluator import Evaluator
from cptv_jax.search.objective import Objective
from cptv_jax.search.strategies.evol_q import Draws, EvolQ

TARGETS = "teacher and start"
# The sites whose scales the published search moves, in this order.
_SEARCHED = ("attn.qkv.weight", "attn.proj.weight")
_SAME = 0.1  # in half-widths of a mutation: two vectors closer than this are the same candidate
_EXACT = 1e-9  # replayed and recorded losses of a population are the same numbers, up to this

Flat = Float[np.ndarray, "*members scales"]


@dataclass(frozen=True)
class _Layout:
    """How a flat vector of scales divides among the sites of one stage.

    Attributes:
        stage: The stage's position.
        sizes: By site relative to the stage, its number of scales, in order.
    """

    stage: int
    sizes: Mapping[str, int]

    @property
    def total(self) -> int:
        """The length of the flat vector."""
        return sum(self.sizes.values())

    def split(self, flat: Flat) -> dict[str, Free]:
        """Returns the scales by site, as a candidate or a population."""
        bounds = np.cumsum(list(self.sizes.values()))[:-1]
        parts = zip(self.sizes, np.split(flat, bounds, axis=-1), strict=True)
        return {site: Free(part) for site, part in parts}

    def join(self, candidate: Mapping[str, Free]) -> Flat:
        """Returns the flat vector of a candidate or a population; the inverse of `split`."""
        return np.concatenate([np.asarray(candidate[site].scale) for site in self.sizes], -1)


def compare_search(recording: Recording) -> list[Check]:
    """Compares a recording of the published evolution, replayed with its recorded draws.

    Args:
        recording: The recording.

    Returns:
        All checks of the file.

    Raises:
        InputError: For a missing or misshapen array.
    """
    meta = recording.meta
    subject = prepare(recording)
    names = recording.under("evo/")
    if not names or sorted(names) != sorted(str(i) for i in range(len(names))):
        raise InputError(f"{recording.path}: the searched blocks must be recorded under 'evo/0/', 'evo/1/' and so on")
    for key in ("fp_logits", "o_fps", "q_logits_before", "q_top1_before"):
        recording.raw(key)
    sites = sites_of(subject.quantized.model.architecture)
    space = Space([site.name for site in sites if site.local in _SEARCHED])
    stages = subject.quantized.stages(Simulated(), space)
    teacher = subject.targets(subject.quantized.stages(Unrounded()))
    objective = Objective("infonce", "logits", meta.number("temperature"))
    strategy = EvolQ(
        step=meta.number("step"),
        population=meta.integer("population"),
        samples=meta.integer("samples"),
        rounds=meta.integer("cycles"),
    )

    found = subject.float_checks(recording)
    logits = np.concatenate([np.asarray(output.logits) for output in teacher])
    recorded = recording.array("o_fps", *logits.shape)
    # The teacher still has integer LayerNorms, whose codes flip as those of a quantized model do.
    found.append(_mean_check(TARGETS, "o_fps", logits - recorded, subject))
    found += subject.quantized_logit_checks(recording, f"{TARGETS}: logits", stages, "q_logits_before", "q_top1_before")

    evaluator = Evaluator(stages, subject.calibration, teacher, objective)
    for name in recording.under("cand/"):
        found += _candidate_checks(recording, subject, evaluator, f"cand/{name}")

    for name in sorted(names, key=int):
        found += _Replay(recording, subject, evaluator, strategy, f"evo/{name}").checks()
    quantizers = {
        f"{stage.name}.{site}": quantizer
        for stage in evaluator.stages
        for site, quantizer in stage.state["quantizers"].items()
    }
    if recording.under("final_param/"):
        rows = parameter_checks(recording, "final_param", quantizers, subject.config.depth, partial=True)
        found += rows
    return found


def _mean_check(group: str, name: str, difference: np.ndarray, subject: Subject) -> Check:
    mean = float(np.mean(np.abs(difference)))
    return Check(group, name, mean, subject.limits.logits_mean, "mean difference", checks.max_abs(difference))


def _layout(recording: Recording, subject: Subject, evaluator: Evaluator, group: str) -> _Layout:
    """Reads the layout from the recorded module, and from `order` and `indices` if they are recorded.

    Returns:
        The layout.

    Raises:
        InputError: If these do not fit the model.
    """
    module = recording.text(f"{group}/module")
    blocks = {f"blocks.{i}.attn": i + 1 for i in range(subject.config.depth)}
    if module not in blocks:
        raise InputError(f"{recording.path}: '{group}/module' is '{module}', which is no attention module of the model")
    index = blocks[module]
    stage = evaluator.stages[index]
    order = list(_SEARCHED)
    if f"{group}/order" in recording:
        known = sites_by_module(subject.config.depth)
        names = [str(name) for name in recording.raw(f"{group}/order").ravel()]
        order = [known.get(name, name).removeprefix(f"{stage.name}.") for name in names]
        if sorted(order) != sorted(_SEARCHED):
            raise InputError(f"{recording.path}: '{group}/order' must name {module}.qkv and {module}.proj, once each")
    sizes = {site: int(np.size(stage.candidate[site].scale)) for site in order}
    if f"{group}/indices" in recording:
        indices = recording.integers(f"{group}/indices", len(order) + 1)
        if indices.tolist() != [0, *np.cumsum(list(sizes.values())).tolist()]:
            raise InputError(f"{recording.path}: '{group}/indices' do not fit scales of sizes {list(sizes.values())}")
    return _Layout(index, sizes)


def _loss_check(group: str, name: str, ours: float, recorded: float) -> Check:
    difference = abs(ours - recorded)
    remark = f"recorded {recorded:.6f}, ours {ours:.6f}"
    return Check(group, name, difference, checks.SEARCH_LOSS, "absolute", remark=remark)


def _candidate_checks(recording: Recording, subject: Subject, evaluator: Evaluator, group: str) -> list[Check]:
    """Returns the checks of given candidates' losses at one block, each put into the calibrated model."""
    layout = _layout(recording, subject, evaluator, group)
    candidates = recording.array(f"{group}/candidates", None, layout.total)
    recorded = recording.array(f"{group}/losses", len(candidates))
    base = evaluator.loss_of(layout.stage, evaluator.stages[layout.stage].candidate)
    losses = evaluator.losses(layout.stage, layout.split(candidates))
    found = [_loss_check(group, "loss_base", base, recording.scalar(f"{group}/loss_base"))]
    found += [
        _loss_check(group, f"candidate {i}", float(ours), float(theirs))
        for i, (ours, theirs) in enumerate(zip(losses, recorded, strict=True))
    ]
    if f"{group}/calib_logits" in recording:
        images = sum(len(batch) for batch in subject.calibration)
        theirs = recording.array(f"{group}/calib_logits", len(candidates), images, subject.config.num_classes)
        for i, candidate in enumerate(candidates):
            stages = list(evaluator.stages)
            stages[layout.stage] = stages[layout.stage].with_candidate(layout.split(np.asarray(candidate, np.float32)))
            ours = np.concatenate([np.asarray(forward(stages, batch).logits) for batch in subject.calibration])
            found.append(_mean_check(group, f"calib_logits {i}", ours - theirs[i], subject))
    return found


@dataclass(frozen=True)
class _Replay:
    """One block's evolution with the recorded draws, which accepts the winner at the end.

    The strategy is told the recorded losses, so that it must find the recorded parents and survivors exactly; ours are
    compared with them one by one, and must rank the population alike. No implementation can rank losses closer than the
    noise floor: there the replay continues along the recorded path.
    """

    recording: Recording
    subject: Subject
    evaluator: Evaluator
    strategy: EvolQ
    group: str

    def checks(self) -> list[Check]:
        """Replays the evolution.

        Returns:
            All checks of the block.
        """
        recording, strategy, group = self.recording, self.strategy, self.group
        layout = _layout(recording, self.subject, self.evaluator, group)
        cycles, count = strategy.rounds, layout.total
        samples = recording.integers(f"{group}/samples", cycles, strategy.samples, below=strategy.population)
        perturbations = recording.array(f"{group}/perturbations", cycles, count)
        losses = recording.array(f"{group}/losses", cycles + 1)
        vectors = recording.array(f"{group}/loss_scales", cycles + 1, count)
        before_losses = recording.array(f"{group}/pop_losses_before_cycle", cycles, strategy.population)
        before_scales = recording.array(f"{group}/pop_scales_before_cycle", cycles, strategy.population, count)

        start = self.evaluator.stages[layout.stage].candidate
        evaluated = [layout.join(start)]
        ours = [self.evaluator.loss_of(layout.stage, start)]
        state = strategy.init(start, float(losses[0]))
        found = [
            self._check_same("init_scales", evaluated[0], recording.array(f"{group}/init_scales", count)),
            _loss_check(group, "base loss", ours[0], float(losses[0])),
        ]
        for cycle in range(cycles):
            members = layout.join(state.candidates)
            found.append(self._check_same(f"cycle {cycle}: survivors", members, before_scales[cycle]))
            found.append(
                self._check_ranking(cycle, state.losses - before_losses[cycle], state.losses, members, evaluated, ours)
            )
            draws = Draws(samples[cycle], layout.split(perturbations[cycle]))
            # The recorded parent is known by its child: the next vector evaluated was parent + perturbation.
            child = strategy.mutate(state, draws)
            evaluated.append(layout.join(child)[0])
            remark = f"member {strategy.parent(state, draws)}"
            found.append(self._check_same(f"cycle {cycle}: parent", evaluated[-1], vectors[cycle + 1], remark))
            ours.append(float(self.evaluator.losses(layout.stage, child)[0]))
            found.append(_loss_check(group, f"cycle {cycle}: loss", ours[-1], float(losses[cycle + 1])))
            state = strategy.tell(state, child, losses[cycle + 1 : cycle + 2])

        winner, loss = strategy.best(state)
        found.append(_loss_check(group, "final loss", loss, recording.scalar(f"{group}/final_loss")))
        found.append(
            self._check_same("final_scales", layout.join(winner), recording.array(f"{group}/final_scales", count))
        )
        self.evaluator.accept(layout.stage, winner)
        name = f"{group}: logits afterwards"
        stages = self.evaluator.stages
        return found + self.subject.quantized_logit_checks(
            recording, name, stages, f"{group}/test_logits_after", f"{group}/top1_after"
        )

    def _check_ranking(
        self,
        cycle: int,
        misfit: np.ndarray,
        losses: np.ndarray,
        members: Flat,
        evaluated: list[np.ndarray],
        ours: list[float],
    ) -> Check:
        """Checks whether our losses rank the population as the recorded ones do.

        Args:
            cycle: The cycle's number.
            misfit: Replayed minus recorded losses of the population.
            losses: Losses of the population before the cycle.
            members: The population before the cycle, one vector of scales each.
            evaluated: Every vector so far.
            ours: Our loss of each of those vectors.

        Returns:
            The check.
        """
        distance = np.max(np.abs(members[:, None] - np.stack(evaluated)[None]), -1)
        own = np.asarray(ours)[np.argmin(distance, -1)]
        # The population is in ascending order of recorded losses: an inversion is a later member with a lower loss.
        inverted = np.triu(own[:, None] > own[None, :])
        gaps = np.where(inverted, losses[None, :] - losses[:, None], 0.0)
        worst = float(np.max(gaps)) if not checks.exceeds(misfit, _EXACT).any() else float("inf")
        remark = "the replayed losses are not the recorded ones" if worst == float("inf") else ""
        unit = "between recorded losses that ours rank the other way"
        return Check(self.group, f"cycle {cycle}: ranking", worst, checks.SEARCH_NOISE, unit, remark=remark)

    def _check_same(self, name: str, ours: Flat, recorded: Flat, remark: str = "") -> Check:
        """Returns the check that vectors of scales are the same candidates. Different ones are a mutation apart."""
        difference = ours - recorded
        members = np.any(
            checks.exceeds(difference, _SAME * (self.strategy.step or 0.0)).reshape(-1, difference.shape[-1]), -1
        )
        unit = f"of {members.size} differ" if members.size > 1 else "differs"
        return Check(self.group, name, float(members.sum()), 0.0, unit, checks.max_abs(difference), remark=remark)
