"""The configuration of a quantization: one class of options for each part, owned by whoever uses it."""

from typing import Literal

from pydantic import Field

from cptv_jax.errors import InputError
from cptv_jax.interpreters.arithmetic import ArithmeticName
from cptv_jax.methods.fq_vit import FqVitOptions
from cptv_jax.methods.registry import METHODS
from cptv_jax.options import Names, one_of, options
from cptv_jax.recipe.resolve import RecipeConfig
from cptv_jax.reconstruction.config import ReconstructionConfig
from cptv_jax.search import STRATEGIES, EvolQ, Objective
from cptv_jax.search.objective import Compared, ObjectiveName


@options
class CalibrationConfig:
    """Calibration images, for base method and search.

    Example:
        >>> config = QuantizeConfig(calibration=CalibrationConfig(images=256, batch=32))
    """

    images: int = Field(default=1000, ge=1)
    """How many images to take in total."""
    batch: int = Field(default=100, ge=1)
    """Images per batch; also the batch of the contrastive loss, where the other images are the negatives."""


@options
class JudgeConfig:
    """How candidates and passes are judged.

    Example:
        >>> search = SearchConfig(judge=JudgeConfig(objective="kl", images=200))
    """

    objective: ObjectiveName | None = None
    """Objective of the search: infonce, kl, mse or cosine, or a sum such as kl+cosine; null means the strategy's:
    infonce, as published, and kl for guided."""
    on: Compared = "logits"
    """Outputs to compare: logits, penultimate features or both."""
    temperature: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """Temperature of infonce and kl; null means 3 for infonce and 1 for kl."""
    teacher: Literal["float", "published"] = "float"
    """Model to compare with: the full-precision model, or the published code's, in which integer LayerNorm and softmax
    stay active."""
    images: int | None = Field(default=None, ge=1)
    """How many images judge candidates, in whole batches; null means the strategy's: all that are not held out, and
    about 200 for guided."""
    holdout: float = Field(default=0.1, ge=0, lt=1)
    """Share of the calibration images, in whole batches, that only serves to pick among passes."""
    patience: int | None = Field(default=None, ge=1)
    """End after this many passes in a row that did not lower the held-out loss; null runs all passes."""


@options
class SpaceConfig:
    """Which parameters the search may change.

    Example:
        >>> search = SearchConfig(strategy=Guided(), space=SpaceConfig(sites=("*.weight",), offsets=True))
    """

    sites: Names | None = None
    """Name patterns of the weight or activation sites whose scales are searched; null means the strategy's: the
    attention's weights, as published, and all weights for guided."""
    offsets: bool | None = None
    """Also search zero points, starts of focusing intervals, exponents of power-of-two factors, factors of
    bias-corrected channels and biases; null means the strategy's: only guided does, and only guided can."""
    rounding: bool | None = None
    """Also search which way each element of a searched weight rounds; null means the value of offsets."""


@options
class ComputeConfig:
    """How the search is computed; only race changes its results.

    Example:
        >>> search = SearchConfig(compute=ComputeConfig(memory_gib=8.0, race=True))
    """

    arithmetic: ArithmeticName | None = None
    """How integer codes are multiplied; null takes the fastest way on this machine."""
    race: bool = False
    """Drop candidates that fall behind on some of the batches; the published search evaluates all of them whole."""
    memory_gib: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """Bound on the activations of each device; null lets the device decide."""
    images_at_once: int | None = Field(default=None, ge=1)
    """How many images to compute at once, on all devices together; null means as many as fit."""
    candidates_at_once: int | None = Field(default=None, ge=1)
    """How many candidates to compute at once, on all devices together; null means as many as fit."""
    population_devices: int = Field(default=1, ge=1)
    """How many groups of devices divide the candidates; the devices of a group divide the images."""
    cache_gib: float = Field(default=4.0, gt=0)
    """Bound on the cached stage inputs."""


@options
class SearchConfig:
    """The search on top of the base method.

    Raises:
        InputError: If `space` asks for offsets that the strategy cannot move, or for roundings without offsets.

    Example:
        >>> search = SearchConfig(strategy=Guided(passes=2), judge=JudgeConfig(objective="kl"))
    """

    strategy: one_of(STRATEGIES) = EvolQ()  # type: ignore[valid-type]
    """Strategy that proposes candidates and keeps survivors."""
    judge: JudgeConfig = JudgeConfig()
    """How candidates and passes are judged."""
    space: SpaceConfig = SpaceConfig()
    """Which parameters the search may change."""
    compute: ComputeConfig = ComputeConfig()
    """How the search is computed."""

    def __post_init__(self) -> None:
        space, strategy = self.space, self.strategy
        offsets = strategy.defaults.offsets if space.offsets is None else space.offsets
        if space.offsets and not strategy.moves_offsets:
            raise InputError(
                f"search.space.offsets is true, but the steps of {strategy.name} are for scales; "
                "choose the strategy guided, or set it to false"
            )
        if space.rounding and not offsets:
            raise InputError(
                "search.space.rounding is true, but search.space.offsets false, and roundings are among the offsets; "
                "set both, or leave rounding out"
            )


@options
class QuantizeConfig:
    """Everything that determines a quantization, apart from the model and the images.

    Raises:
        InputError: If a contrastive objective has batches of one image.

    Example:
        >>> config = QuantizeConfig(seed=1, search=SearchConfig(strategy=Guided()))
        >>> outcome = quantize(model, images, config)
    """

    method: one_of(METHODS) = FqVitOptions()  # type: ignore[valid-type]
    """The base method."""
    seed: int = Field(default=0, ge=0, lt=2**32)
    """Seed of everything that is drawn: image order, held-out slice, and the draws of method, reconstruction and
    search."""
    recipe: RecipeConfig = RecipeConfig()
    """Which sites are quantized, and how."""
    calibration: CalibrationConfig = CalibrationConfig()
    """Calibration images."""
    reconstruction: ReconstructionConfig = ReconstructionConfig()
    """Block reconstruction after the base method."""
    search: SearchConfig = SearchConfig()
    """The search on top of the base method."""

    def __post_init__(self) -> None:
        objective = judging_objective(self.search)
        if self.search.strategy.passes and "infonce" in objective.names and self.calibration.batch < 2:
            raise InputError(
                f"calibration.batch is 1, but search.judge.objective {objective.name} contrasts the images of a batch; "
                "set calibration.batch to at least 2, or choose another search.judge.objective"
            )


def judging_objective(search: SearchConfig) -> Objective:
    """Determines the objective that judges candidates.

    Args:
        search: The search's configuration.

    Returns:
        The configured objective, or the strategy's if the configuration names none.
    """
    judge = search.judge
    return Objective(judge.objective or search.strategy.defaults.objective, judge.on, judge.temperature)
