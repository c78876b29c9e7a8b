"""What a configuration comes to for a model and its images, settled before anything is computed."""

from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

import numpy as np

from cptv_jax.config.schema import QuantizeConfig, SearchConfig, check, completed_search, effort
from cptv_jax.data import Images
from cptv_jax.errors import InputError, did_you_mean
from cptv_jax.methods.base import Method, require_float
from cptv_jax.methods.registry import METHODS
from cptv_jax.models.architecture import sites_of
from cptv_jax.quantized.model import Model
from cptv_jax.recipe.presets import PRESETS
from cptv_jax.recipe.resolve import resolve
from cptv_jax.recipe.spec import Recipe
from cptv_jax.reconstruction.training import completed
from cptv_jax.runtime.mesh import check_population
from cptv_jax.search import Evosax


@dataclass(frozen=True)
class Split:
    """Calibration images in batches.

    calibration: for the base method; the search uses the first `searched` of them. held_out: only pick among passes.
    """

    calibration: list[Images]
    held_out: list[Images]
    searched: int


_GUIDED_IMAGES = 200  # enough to judge proposals, which gradients on all images make


def _split(images: Images, config: QuantizeConfig) -> Split:
    wanted, batch = config.calibration.images, config.calibration.batch
    if len(images) < wanted:
        raise InputError(
            f"{len(images)} calibration images given, {wanted} wanted; "
            f"give more, or set --calibration.images {len(images)}"
        )
    count = wanted // batch
    if count == 0:
        raise InputError(
            f"{wanted} calibration images make no batch of {batch}; "
            f"set --calibration.batch {wanted} or give more images"
        )
    order = np.random.default_rng([config.seed, len(images)]).permutation(len(images))
    batches = [images.take(order[i * batch : (i + 1) * batch]) for i in range(count)]
    searching = config.search.strategy != "none" and config.search.holdout > 0
    held_out = min(max(1, round(config.search.holdout * count)), count - 1) if searching else 0
    searched = _searched(config.search, batch, count - held_out)
    if not 1 <= searched <= count - held_out:
        raise InputError(
            f"search.images is {config.search.images}; "
            f"it must lie between {batch} (a batch) and {(count - held_out) * batch}"
        )
    return Split(batches[: count - held_out], batches[count - held_out :], searched)


def _searched(search: SearchConfig, batch: int, available: int) -> int:
    """How many batches judge candidates."""
    if search.images is not None:
        return search.images // batch
    return min(available, max(1, _GUIDED_IMAGES // batch)) if search.strategy == "guided" else available


def _with_method(config: QuantizeConfig) -> tuple[QuantizeConfig, Method]:
    """The base method, and the configuration with what it decides filled in. Raises InputError where they clash."""
    if config.method not in METHODS:
        raise InputError(f"unknown method '{config.method}'{did_you_mean(config.method, METHODS)}")
    method = METHODS[config.method]
    preset = config.recipe.preset or method.presets[0]
    if preset in PRESETS and preset not in method.presets:
        raise InputError(
            f"method {config.method} cannot carry out the recipe preset '{preset}'; "
            f"set --recipe.preset to one of {', '.join(method.presets)}"
        )
    reconstruction = completed(config.reconstruction, method.reconstruction)
    recipe, search = replace(config.recipe, preset=preset), completed_search(config.search)
    return replace(config, recipe=recipe, reconstruction=reconstruction, search=search), method


def check_size(model: Model, images: Images) -> None:
    """Raises InputError for images of another size or number of channels than the model's."""
    preprocessing = model.architecture.preprocessing
    wanted = (preprocessing.image_size, preprocessing.image_size, len(preprocessing.mean))
    if tuple(images.pixels.shape[1:]) != wanted:
        raise InputError(
            f"the images have shape {tuple(images.pixels.shape[1:])}, but {model.architecture.name} needs {wanted}; "
            "load them with the model's preprocessing"
        )


def searched_sites(recipe: Recipe, search: SearchConfig) -> frozenset[str]:
    """The quantized sites that match search.sites. Raises InputError where there are none, or some have no scale."""
    patterns = completed_search(search).sites or ()
    for pattern in patterns if search.sites else ():
        if not any(fnmatchcase(site, pattern) for site in recipe.sites):
            near = did_you_mean(pattern, recipe.sites)
            raise InputError(f"search.sites: no quantized site matches '{pattern}'{near}")
    sites = [site for site in recipe.sites if any(fnmatchcase(site, pattern) for pattern in patterns)]
    if not sites:
        raise InputError(f"search.sites are {list(patterns)}, and none of them is quantized; name others")
    fixed = [site for site in sites if recipe.sites[site].quantizer == "log2"]
    if fixed:
        raise InputError(f"search.sites match {fixed[0]}, whose log2 quantizer has no scale to search; leave it out")
    return frozenset(sites)


@dataclass(frozen=True)
class Plan:
    """What a configuration comes to for a model and its images.

    config: with what the base method decides filled in: recipe preset, reconstruction.
    """

    config: QuantizeConfig
    method: Method
    recipe: Recipe
    split: Split

    @property
    def base_images(self) -> int:
        """How many images the base method reads, reconstruction of its blocks included."""
        given = sum(len(batch) for batch in self.split.calibration)
        if not self.method.first_images:
            return given
        learned = self.config.reconstruction.images or given if self.config.reconstruction.steps else 0
        return min(given, max(getattr(self.config, str(self.method.options)).images, learned))


def planned(model: Model, images: Images, config: QuantizeConfig) -> Plan:
    """Everything that can be settled before anything is computed. Raises InputError for what cannot work."""
    check(config)
    require_float(model)
    config, method = _with_method(config)
    check_size(model, images)
    recipe = resolve(config.recipe, sites_of(model.architecture))
    if method.abilities is not None:
        method.abilities.check(config.method, recipe)
    method.check(model.architecture, recipe, method.options and getattr(config, method.options))
    plan = Plan(config, method, recipe, _split(images, config))
    _check_search(plan)
    return plan


def _check_search(plan: Plan) -> None:
    """Raises InputError for a search that this base, or the images held out, leave without a meaning."""
    config, search = plan.config, plan.config.search
    if search.offsets and search.strategy != "guided":
        raise InputError(
            f"search.offsets is true, but the steps of {search.strategy} are for scales; "
            "set --search.strategy guided, or --search.offsets false"
        )
    if search.rounding and not search.offsets:
        raise InputError(
            "search.rounding is true, but search.offsets false, and roundings are among the offsets; "
            "set both, or --search.rounding false"
        )
    if search.strategy == "none":
        return
    searched_sites(plan.recipe, search)
    check_population(search.population_devices)
    if search.strategy == "evosax":
        Evosax(search.algorithm, children=effort(search).children)
    if search.teacher == "published" and (plan.method.rewrites_weights or config.reconstruction.steps):
        raise InputError(
            "search.teacher is published, the unrounded pass of the quantized model, but here its weights are not the "
            "float model's; set --search.teacher float"
        )
    if search.patience is not None and not plan.split.held_out:
        raise InputError(
            f"search.patience is {search.patience}, but no images are held out to judge passes by; "
            "raise --search.holdout, lower --calibration.batch, or leave patience out"
        )
