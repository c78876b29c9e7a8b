"""Configuration of a quantization."""

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from cptv_jax.errors import InputError
from cptv_jax.interpreters.arithmetic import ArithmeticName
from cptv_jax.methods.aiqvit import AiqvitOptions
from cptv_jax.methods.erq import ErqOptions
from cptv_jax.methods.ptq4vit import Ptq4VitOptions
from cptv_jax.methods.repq_vit import RepqVitOptions
from cptv_jax.recipe.resolve import RecipeConfig
from cptv_jax.reconstruction.training import ReconstructionConfig
from cptv_jax.search.objective import Compared, Objective

_PUBLISHED_SITES = ("blocks.*.attn.qkv.weight", "blocks.*.attn.proj.weight")


@dataclass(frozen=True)
class CalibrationConfig:
    """images: how many calibration images to take in all, for base method and search. batch: images per batch; also
    the batch of the contrastive loss, where the other images are the negatives."""

    images: int = 1000
    batch: int = 100


@dataclass(frozen=True)
class SearchConfig:
    """The search on top of the base method.

    strategy: "evol-q" (the published one), "generational", "guided" (gradients propose, evolution decides), "evosax"
        (an algorithm of that library), or "none".
    objective, on, temperature: see cptv_jax.search.objective.Objective. A null objective means the strategy's: infonce,
        as published, and for guided kl (infoNCE also falls where outputs move apart that the teacher has close
        together). A null temperature is 3 for infoNCE and 1 for KL.
    gradient_objective: what guided differentiates; null means the objective, and where that is null too infonce.
    teacher: "float" is the full-precision model; "published" keeps integer LayerNorm (and softmax) active in it, as
        the published code does.
    sites: name patterns of the weight or activation sites whose scales are searched; null means the strategy's: the
        attention's weights, as published, and for guided all weights.
    offsets: also their zero points, the starts of focusing intervals, the exponents of power-of-two factors, the
        factors of bias-corrected channels and the biases of the weights' layers (guided only, and there unless set to
        false).
    rounding: also which way each element of a searched weight rounds (guided only, and there unless set to false): in
        closed form before the first gradient, and by gradients.
    passes: sweeps over the blocks, last block first. rounds: cycles or generations a block and pass. children: a
        generation. Null means the strategy's: 10, 3 and 8, and for guided 1, 1 and 3.
    holdout: fraction of the calibration images, in whole batches, that only picks among passes.
    images: how many of the remaining ones judge candidates, in whole batches; null means all, for guided about 200.
    population, samples, step: of evol-q; step is absolute, null means 1e-4 for 8-bit weights and 1e-3 otherwise.
    sigma, survivors: of generational; sigma is in log-scale. guided and evosax have the first.
    algorithm: of evosax.
    gradient_steps, gradient_rate, gradient_batch: of guided, a pass: optimizer steps, their rate at the start in
        log-scale, images a step; all calibration images but those held out take turns. mirror: and their mirror
        images. mixup: mixed in pairs, which the teacher is asked about too.
    gradient_matching: of guided: weight, in the loss that is differentiated, of how far the outputs of all stages are
        from the teacher's (mean squared error relative to the variance), beside the objective.
    patience: end after so many passes in a row that did not lower the held-out loss; null goes through all.
    race: drop candidates that fall behind on some of the batches (the published search evaluates all of them whole).
    arithmetic: how integer codes are multiplied; null takes what is fastest here, and losses are the same. Gradients
        are computed in bfloat16 (bf16-codes, and null where the backend can) or float32.
    memory_gib: bound on the activations of each device; null lets the device decide.
    images_at_once, candidates_at_once: how many, on all devices together, instead of as many as fit.
    population_devices: how many groups of devices divide the candidates; the devices of a group divide the images.
    cache_gib: bound on the cached stage inputs.
    """

    strategy: Literal["evol-q", "generational", "guided", "evosax", "none"] = "evol-q"
    objective: str | None = None
    on: Compared = "logits"
    temperature: float | None = None
    teacher: Literal["float", "published"] = "float"
    sites: tuple[str, ...] | None = None
    offsets: bool | None = None
    rounding: bool | None = None
    passes: int | None = None
    rounds: int | None = None
    holdout: float = 0.1
    images: int | None = None
    population: int = 15
    samples: int = 10
    step: float | None = None
    sigma: float = 0.01
    children: int | None = None
    survivors: int = 2
    algorithm: Literal["Sep_CMA_ES", "CMA_ES", "SNES", "Open_ES", "PGPE"] = "Sep_CMA_ES"
    gradient_steps: int = 400
    gradient_rate: float = 0.0015
    gradient_batch: int = 10
    gradient_objective: str | None = None
    gradient_matching: float = 100.0
    mirror: bool = True
    mixup: bool = True
    patience: int | None = None
    race: bool = False
    arithmetic: ArithmeticName | None = None
    memory_gib: float | None = None
    images_at_once: int | None = None
    candidates_at_once: int | None = None
    population_devices: int = 1
    cache_gib: float = 4.0


class Effort(NamedTuple):
    """How much a search does: passes over the blocks, rounds at a block, children in a round."""

    passes: int
    rounds: int
    children: int


_PUBLISHED_EFFORT, _GUIDED_EFFORT = Effort(10, 3, 8), Effort(1, 1, 3)


def effort(search: SearchConfig) -> Effort:
    """The search's effort, with what its strategy decides filled in."""
    usual = _GUIDED_EFFORT if search.strategy == "guided" else _PUBLISHED_EFFORT
    given = (search.passes, search.rounds, search.children)
    return Effort(*(own if value is None else value for value, own in zip(given, usual, strict=True)))


def completed_search(search: SearchConfig) -> SearchConfig:
    """The search with what its strategy decides filled in, but for the number of images, which depends on the batch."""
    guided = search.strategy == "guided"
    sites = search.sites or (("*.weight",) if guided else _PUBLISHED_SITES)
    offsets = guided if search.offsets is None else search.offsets
    rounding = offsets if search.rounding is None else search.rounding
    return dataclasses.replace(
        search,
        objective=search.objective or ("kl" if guided else "infonce"),
        gradient_objective=search.gradient_objective or search.objective or "infonce",
        sites=sites,
        offsets=offsets,
        rounding=rounding,
        **effort(search)._asdict(),
    )


class Objectives(NamedTuple):
    """What decides about candidates, and what guided differentiates to propose them."""

    judging: Objective
    proposing: Objective


def objectives(search: SearchConfig) -> Objectives:
    """The search's objectives. Raises InputError for what is none."""
    whole = completed_search(search)
    assert whole.objective is not None and whole.gradient_objective is not None
    judging = Objective(whole.objective, whole.on, whole.temperature)
    try:
        return Objectives(judging, dataclasses.replace(judging, name=whole.gradient_objective))
    except InputError as error:  # of the only field that differs
        raise InputError(str(error).replace("search.objective", "search.gradient_objective")) from None


@dataclass(frozen=True)
class QuantizeConfig:
    """Everything that determines a quantization, beside the model and the images.

    method: base method; the fields named after methods hold their options. reconstruction: of its blocks, off by
    default but for aiqvit. seed: of everything that is drawn: image order, held-out slice, what base methods draw,
    reconstruction and search.
    """

    method: str = "fq-vit"
    seed: int = 0
    recipe: RecipeConfig = field(default_factory=RecipeConfig)
    ptq4vit: Ptq4VitOptions = field(default_factory=Ptq4VitOptions)
    repq_vit: RepqVitOptions = field(default_factory=RepqVitOptions)
    erq: ErqOptions = field(default_factory=ErqOptions)
    aiqvit: AiqvitOptions = field(default_factory=AiqvitOptions)
    calibration: CalibrationConfig = field(default_factory=CalibrationConfig)
    reconstruction: ReconstructionConfig = field(default_factory=ReconstructionConfig)
    search: SearchConfig = field(default_factory=SearchConfig)


_AT_LEAST = {
    "calibration.images": 1,
    "calibration.batch": 1,
    "repq_vit.images": 1,
    "erq.images": 1,
    "aiqvit.images": 1,
    "aiqvit.search_images": 1,
    "aiqvit.search_steps": 0,
    "reconstruction.steps": 0,
    "reconstruction.batch": 1,
    "reconstruction.images": 1,
    "erq.flips": 0,
    "search.passes": 1,
    "search.rounds": 1,
    "search.population": 1,
    "search.samples": 1,
    "search.children": 1,
    "search.survivors": 1,
    "search.gradient_steps": 1,
    "search.gradient_batch": 2,
    "search.patience": 1,
    "search.images": 1,
    "search.images_at_once": 1,
    "search.candidates_at_once": 1,
    "search.population_devices": 1,
    "ptq4vit.images": 1,
    "ptq4vit.candidates": 1,
    "ptq4vit.rounds": 1,
    "ptq4vit.images_at_once": 1,
    "ptq4vit.candidates_at_once": 1,
}
_RATES = (
    "aiqvit.penalty",
    "search.gradient_matching",
    "reconstruction.scale_rate",
    "reconstruction.zero_point_rate",
    "reconstruction.rounding_rate",
    "reconstruction.weight_rate",
    "reconstruction.low_rank_rate",
)
_SHARES = ("reconstruction.float_input", "reconstruction.easy_first")
_SEEDS = 2**32
_POSITIVE = (
    "erq.coe",
    "ptq4vit.alpha",
    "ptq4vit.beta",
    "search.temperature",
    "search.step",
    "search.sigma",
    "search.gradient_rate",
    "search.cache_gib",
    "search.memory_gib",
)


def check(config: QuantizeConfig) -> None:
    """Raises InputError for values that no run can use."""
    flat = flatten(config)
    for name, least in _AT_LEAST.items():
        if flat[name] is not None and flat[name] < least:
            raise InputError(f"{name} is {flat[name]}; it must be at least {least}")
    for name in _POSITIVE:
        if flat[name] is not None and not flat[name] > 0:
            raise InputError(f"{name} is {flat[name]}; it must be positive")
        if flat[name] is not None and name != "search.cache_gib" and math.isinf(flat[name]):
            raise InputError(f"{name} is infinite; it must be a finite number")
    for name in _RATES:
        if not 0 <= flat[name] < math.inf:
            raise InputError(f"{name} is {flat[name]}; it must be 0 or positive, and finite")
    for name in _SHARES:
        if flat[name] is not None and not 0 <= flat[name] <= 1:
            raise InputError(f"{name} is {flat[name]}; it must lie between 0 and 1")
    if not 0 <= config.seed < _SEEDS:
        raise InputError(f"seed is {config.seed}; it must be at least 0 and below 2^32")
    objective, _ = objectives(config.search)
    if config.search.strategy != "none" and "infonce" in objective.names and config.calibration.batch < 2:
        raise InputError(
            f"calibration.batch is 1, but search.objective {objective.name} contrasts the images of a batch; "
            "set --calibration.batch to at least 2, or choose another --search.objective"
        )
    if not 0 <= config.search.holdout < 1:
        raise InputError(f"search.holdout is {config.search.holdout}; it must be at least 0 and below 1")


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """Fields by dotted name."""
    flat: dict[str, Any] = {}
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        if dataclasses.is_dataclass(value):
            flat |= flatten(value, f"{prefix}{f.name}.")
        else:
            flat[f"{prefix}{f.name}"] = value
    return flat


def to_mapping(config: Any) -> dict[str, Any]:
    """Nested plain data, as YAML and JSON hold it."""
    return _plain(dataclasses.asdict(config))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value
