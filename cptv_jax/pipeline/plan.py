"""A configuration resolved against a model and its images, before anything is computed."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cptv_jax.config.schema import ComputeConfig, QuantizeConfig, SearchConfig, judging_objective
from cptv_jax.data import Images
from cptv_jax.errors import InputError, did_you_mean
from cptv_jax.methods.base import Method, require_float
from cptv_jax.methods.registry import METHODS
from cptv_jax.models.architecture import Architecture, sites_of
from cptv_jax.quantized.candidate import Space
from cptv_jax.quantized.model import Model, QuantizedModel
from cptv_jax.recipe.presets import PRESETS
from cptv_jax.recipe.resolve import resolve
from cptv_jax.recipe.spec import Recipe
from cptv_jax.reconstruction.config import ReconstructionConfig, complete
from cptv_jax.runtime.mesh import check_population
from cptv_jax.search import Objective, Strategy


@dataclass(frozen=True)
class Split:
    """Calibration images in batches.

    Attributes:
        calibration: Batches for the base method; the search uses the first `searched` of them.
        held_out: Batches that only serve to pick among passes.
        searched: How many batches judge candidates.
    """

    calibration: list[Images]
    held_out: list[Images]
    searched: int


@dataclass(frozen=True)
class SearchPlan:
    """A search with nothing left open.

    Attributes:
        strategy: The strategy that proposes candidates and keeps survivors.
        objective: The objective that judges them.
        teacher: See JudgeConfig.
        space: The parameters that may change.
        compute: How it is computed.
        patience: See JudgeConfig.
        widths: Bits of the searched sites, by stage.
        key: Key of everything that the search draws.
    """

    strategy: Strategy
    objective: Objective
    teacher: str
    space: Space
    compute: ComputeConfig
    patience: int | None
    widths: Mapping[str, tuple[int, ...]]
    key: jax.Array


@dataclass(frozen=True)
class Plan:
    """A configuration resolved against a model and its images.

    Attributes:
        config: The configuration with every open field filled in, for the record; no later step reads it.
        method: The base method.
        options: Its options.
        recipe: The table of quantized sites.
        split: The calibration images.
        reconstruction: The reconstruction's configuration, without null fields.
        search: The plan of the search; None without a search.
        key: Key of the draws of the base method and the reconstruction.
        notes: Requests of the configuration that are not met, in sentences.
    """

    config: QuantizeConfig
    method: Method
    options: Any
    recipe: Recipe
    split: Split
    reconstruction: ReconstructionConfig
    search: SearchPlan | None
    key: jax.Array
    notes: tuple[str, ...] = ()

    @property
    def base_images(self) -> int:
        """The number of images that the base method reads, including the reconstruction of its blocks."""
        given = sum(len(batch) for batch in self.split.calibration)
        if not self.method.first_images:
            return given
        learned = self.reconstruction.images or given if self.reconstruction.steps else 0
        return min(given, max(self.options.images, learned))

    def base_model(self, model: Model, on_progress: Callable[[int, int], None]) -> QuantizedModel:
        """Carries out the base method, without any reconstruction of its blocks.

        Args:
            model: The float model.
            on_progress: Called as on_progress(done, total).

        Returns:
            The quantized model.
        """
        batches = [jnp.asarray(batch.normalize(0, len(batch))) for batch in self.split.calibration]
        return self.method.quantize(model, batches, self.recipe, self.key, on_progress, options=self.options)


def make_plan(model: Model, images: Images, config: QuantizeConfig) -> Plan:
    """Resolves a configuration against a model and its images, before anything is computed.

    Args:
        model: The float model.
        images: Calibration images.
        config: The configuration.

    Returns:
        The plan.

    Raises:
        InputError: If the configuration cannot work with this model and these images.
    """
    require_float(model)
    method = METHODS[config.method.name]
    check_size(model, images)
    recipe_config = replace(config.recipe, preset=_preset(config, method))
    recipe = resolve(recipe_config, sites_of(model.architecture))
    if method.abilities is not None:
        method.abilities.check(method.name, recipe)
    method.check(model.architecture, recipe, config.method)
    reconstruction = complete(config.reconstruction, method.reconstruction)
    split = _split(images, config)
    search, search_config = None, config.search
    if config.search.strategy.passes:
        key = jax.random.key(config.seed)
        architecture, batch = model.architecture, config.calibration.batch
        search, search_config = _plan_search(config.search, architecture, recipe, split, batch, key)
        _check_search(config.search, method, reconstruction, split)
    whole = replace(config, recipe=recipe_config, reconstruction=reconstruction, search=search_config)
    base_key = jax.random.fold_in(jax.random.key(config.seed), 0)
    notes = _notes(config, recipe)
    return Plan(whole, method, config.method, recipe, split, reconstruction, search, base_key, notes)


def check_size(model: Model, images: Images) -> None:
    """Checks that images fit a model.

    Args:
        model: The model.
        images: The images.

    Raises:
        InputError: If the images have another size or number of channels than the model needs.
    """
    preprocessing = model.architecture.preprocessing
    wanted = (preprocessing.image_size, preprocessing.image_size, len(preprocessing.mean))
    if tuple(images.pixels.shape[1:]) != wanted:
        raise InputError(
            f"the images have shape {tuple(images.pixels.shape[1:])}, but {model.architecture.name} needs {wanted}; "
            "load them with the model's preprocessing"
        )


def _preset(config: QuantizeConfig, method: Method) -> str:
    """The recipe's preset, the method's where none is named."""
    preset = config.recipe.preset or method.presets[0]
    if preset in PRESETS and preset not in method.presets:
        raise InputError(
            f"method {method.name} cannot carry out the recipe preset '{preset}'; "
            f"set recipe.preset to one of {', '.join(method.presets)}"
        )
    return preset


def _notes(config: QuantizeConfig, recipe: Recipe) -> tuple[str, ...]:
    notes = []
    images, batch = config.calibration.images, config.calibration.batch
    if images % batch:
        notes.append(
            f"{images % batch} of the {images} calibration images asked for make no whole batch of {batch} and are not "
            "used."
        )
    return (*notes, *recipe.remarks)


def _split(images: Images, config: QuantizeConfig) -> Split:
    wanted, batch = config.calibration.images, config.calibration.batch
    if len(images) < wanted:
        raise InputError(
            f"{len(images)} calibration images given, {wanted} wanted; "
            f"give more, or set calibration.images to {len(images)}"
        )
    count = wanted // batch
    if count == 0:
        raise InputError(
            f"{wanted} calibration images make no batch of {batch}; "
            f"set calibration.batch to {wanted} or give more images"
        )
    order = np.random.default_rng([config.seed, len(images)]).permutation(len(images))
    batches = [images.take(order[i * batch : (i + 1) * batch]) for i in range(count)]
    search = config.search
    searching = search.strategy.passes and search.judge.holdout > 0
    held_out = min(max(1, round(search.judge.holdout * count)), count - 1) if searching else 0
    available = count - held_out
    return Split(batches[:available], batches[available:], judging_batches(search, batch, available))


def judging_batches(search: SearchConfig, batch: int, available: int) -> int:
    """Counts the batches that judge candidates.

    Args:
        search: The search's configuration.
        batch: Images per batch.
        available: Number of batches that are not held out.

    Returns:
        The number of batches.

    Raises:
        InputError: If the requested images are not whole batches, or are more than there are.
    """
    images = search.judge.images
    if images is None:
        usual = search.strategy.defaults.images if search.strategy.passes else None
        return available if usual is None else min(available, max(1, usual // batch))
    if not batch <= images <= available * batch:
        raise InputError(
            f"search.judge.images is {images}; it must lie between {batch} (a batch) and {available * batch}"
        )
    if images % batch:
        raise InputError(
            f"search.judge.images is {images}, which are no whole batches of {batch}; "
            f"set it to {images // batch * batch}, or choose another calibration.batch"
        )
    return images // batch


def _plan_search(
    search: SearchConfig, architecture: Architecture, recipe: Recipe, split: Split, batch: int, key: jax.Array
) -> tuple[SearchPlan, SearchConfig]:
    """The search with everything filled in, and its configuration likewise."""
    strategy, defaults = search.strategy.complete(search.judge.objective), search.strategy.defaults
    patterns = search.space.sites or defaults.sites or architecture.family.searched_sites
    offsets = defaults.offsets if search.space.offsets is None else search.space.offsets
    rounding = offsets if search.space.rounding is None else search.space.rounding
    sites = searched_sites(recipe, patterns, named=search.space.sites is not None)
    widths = {
        stage: tuple(spec.bits for site, spec in recipe.of_stage(stage).items() if f"{stage}.{site}" in sites)
        for stage in architecture.stage_names
    }
    objective = judging_objective(search)
    check_population(search.compute.population_devices)
    planned = SearchPlan(
        strategy,
        objective,
        search.judge.teacher,
        Space(sites, offsets, rounding),
        search.compute,
        search.judge.patience,
        widths,
        key,
    )
    judge = replace(search.judge, objective=objective.name, images=split.searched * batch)
    space = replace(search.space, sites=patterns, offsets=offsets, rounding=rounding)
    return planned, replace(search, strategy=strategy, judge=judge, space=space)


def searched_sites(recipe: Recipe, patterns: tuple[str, ...], named: bool = True) -> frozenset[str]:
    """Finds the quantized sites that match patterns.

    Args:
        recipe: The table of quantized sites.
        patterns: Patterns of their names.
        named: Whether the user named them, so that each must match something.

    Returns:
        Full names.

    Raises:
        InputError: If no site matches, or a matching site has no scale.
    """
    for pattern in patterns if named else ():
        if not any(fnmatchcase(site, pattern) for site in recipe.sites):
            near = did_you_mean(pattern, recipe.sites)
            raise InputError(f"search.space.sites: no quantized site matches '{pattern}'{near}")
    sites = [site for site in recipe.sites if any(fnmatchcase(site, pattern) for pattern in patterns)]
    if not sites:
        raise InputError(f"search.space.sites are {list(patterns)}, and none of them is quantized; name others")
    fixed = [site for site in sites if recipe.sites[site].quantizer == "log2"]
    if fixed:
        raise InputError(
            f"search.space.sites match {fixed[0]}, whose log2 quantizer has no scale to search; leave it out"
        )
    return frozenset(sites)


def _check_search(search: SearchConfig, method: Method, reconstruction: ReconstructionConfig, split: Split) -> None:
    """Raises InputError for a search that this base, or the images held out, leave without a meaning."""
    if search.judge.teacher == "published" and (method.rewrites_weights or reconstruction.steps):
        raise InputError(
            "search.judge.teacher is published, the unrounded pass of the quantized model, but here its weights are "
            "not the float model's; set search.judge.teacher to float"
        )
    if search.judge.patience is not None and not split.held_out:
        raise InputError(
            f"search.judge.patience is {search.judge.patience}, but no images are held out to judge passes by; "
            "raise search.judge.holdout, lower calibration.batch, or leave patience out"
        )
