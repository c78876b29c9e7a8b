"""Float and quantized models as checkpoints."""

from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cptv_jax.errors import InputError, did_you_mean
from cptv_jax.models.architecture import Architecture, abstract_weights, site_table
from cptv_jax.models.family import FAMILIES
from cptv_jax.models.preprocessing import Preprocessing
from cptv_jax.models.timm_weights import from_timm
from cptv_jax.models.weight_files import read_weights
from cptv_jax.models.zoo import architecture_named, guess_architecture
from cptv_jax.quantized.model import Model, QuantizedModel
from cptv_jax.quantizers import QUANTIZER_CLASSES, Quantizer, name_of_quantizer
from cptv_jax.recipe.spec import Recipe, SiteSpec
from cptv_jax.storage.trees import METADATA, restore_tree, save_tree

# ---- models ---------------------------------------------------------------------------------------------------------


def _architecture_to_json(architecture: Architecture) -> dict[str, Any]:
    return {
        "name": architecture.name,
        "family": architecture.family.name,
        "config": asdict(architecture.config),
        "preprocessing": asdict(architecture.preprocessing),
    }


def _to_tuples(value: Any) -> Any:
    """Returns JSON's lists as the tuples that configurations consist of."""
    return tuple(_to_tuples(item) for item in value) if isinstance(value, list) else value


def _architecture_from_json(path: Path, data: Mapping[str, Any]) -> Architecture:
    family = data.get("family")
    if not isinstance(family, str) or family not in FAMILIES:
        raise InputError(
            f"{path / METADATA} names the model family {family!r}, which is not registered"
            f"{did_you_mean(str(family), FAMILIES)}; import the code that registers it (cptv_jax.register_family) first"
        )
    try:
        config, preprocessing = (
            {key: _to_tuples(value) for key, value in data[part].items()} for part in ("config", "preprocessing")
        )
        return Architecture(
            data["name"], FAMILIES[family], FAMILIES[family].config(**config), Preprocessing(**preprocessing)
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{path / METADATA} describes no architecture that this cptv knows ({error}); use the cptv that wrote it"
        ) from None


def _recipe_to_json(recipe: Recipe) -> dict[str, Any]:
    """Returns a recipe without its places, which follow from the architecture."""
    plain = {f.name: getattr(recipe, f.name) for f in fields(recipe) if f.name != "places"}
    return {**plain, "sites": {site: asdict(spec) for site, spec in recipe.sites.items()}}


def _recipe_from_json(data: Mapping[str, Any], architecture: Architecture) -> Recipe:
    values = {key: _to_tuples(value) for key, value in data.items()}
    specs = {site: SiteSpec(**spec) for site, spec in data["sites"].items()}
    return Recipe(**{**values, "sites": specs, "places": dict(site_table(architecture))})


def _quantizer_to_json(site: str, quantizer: Quantizer) -> dict[str, Any]:
    """Describes a quantizer by the registered names of its class and of those nested in it.

    Returns:
        The names, nested as the quantizers are.

    Raises:
        InputError: A class is not registered.
    """
    kind = name_of_quantizer(quantizer)
    if kind is None:
        cls = type(quantizer).__name__
        raise InputError(
            f"the quantizer of {site} is a {cls}, a class that no file could name; "
            f'call register_quantizer("{cls}", {cls}) where it is defined, then save again'
        )
    nested = {f.name: getattr(quantizer, f.name) for f in fields(quantizer)}  # type: ignore[arg-type]
    inner = {name: _quantizer_to_json(site, value) for name, value in nested.items() if isinstance(value, Quantizer)}
    return {"kind": kind, **inner}


def _quantizer_to_arrays(quantizer: Quantizer) -> dict[str, Any]:
    values = {f.name: getattr(quantizer, f.name) for f in fields(quantizer)}  # type: ignore[arg-type]
    present = {name: value for name, value in values.items() if value is not None}
    return {name: _quantizer_to_arrays(v) if isinstance(v, Quantizer) else v for name, v in present.items()}


def _quantizer_from(where: str, description: Mapping[str, Any], arrays: Mapping[str, Any]) -> Quantizer:
    values = {
        name: _quantizer_from(where, description[name], value) if name in description else jnp.asarray(value)
        for name, value in arrays.items()
    }
    if description["kind"] not in QUANTIZER_CLASSES:
        raise InputError(
            f"{where} is of class '{description['kind']}', which is not registered here; "
            "import the code that registers it first"
        )
    return QUANTIZER_CLASSES[description["kind"]](**values)


def save_model(path: Path, model: Model | QuantizedModel) -> None:
    """Writes a float or quantized model as a checkpoint directory.

    Args:
        path: The directory to make.
        model: The model.

    Raises:
        InputError: The path exists, is not UTF-8, or is on a full disk; or a quantizer's class is not registered.

    Example:
        >>> save_model(Path("deit_tiny"), load_model("hub:timm/deit_tiny_patch16_224.fb_in1k"))
    """
    plain = model.model if isinstance(model, QuantizedModel) else model
    tree: dict[str, Any] = {"weights": plain.weights}
    metadata: dict[str, Any] = {
        "kind": "model",
        "architecture": _architecture_to_json(plain.architecture),
        "source": plain.source,
        "sha256": plain.sha256,
    }
    if isinstance(model, QuantizedModel):
        tree["quantizers"] = {site: _quantizer_to_arrays(q) for site, q in model.quantizers.items()}
        metadata |= {
            "kind": "quantized",
            "recipe": _recipe_to_json(model.recipe),
            "quantizers": {site: _quantizer_to_json(site, q) for site, q in model.quantizers.items()},
        }
    save_tree(path, tree, metadata)


def _load_checkpoint(path: Path) -> Model | QuantizedModel:
    tree, metadata = restore_tree(path)
    architecture = _architecture_from_json(path, metadata.get("architecture", {}))
    expected = jax.tree.map(
        lambda a: tuple(a.shape), abstract_weights(architecture), is_leaf=lambda a: hasattr(a, "shape")
    )
    found = jax.tree.map(np.shape, tree.get("weights"))
    if expected != found:
        raise InputError(
            f"{path} holds the weights of another model than the {architecture.name} it names; import again"
        )
    weights = jax.tree.map(jnp.asarray, tree["weights"])
    model = Model(architecture, weights, metadata.get("source", ""), metadata.get("sha256", ""))
    if metadata.get("kind") != "quantized":
        return model
    try:
        recipe = _recipe_from_json(metadata["recipe"], architecture)
        # In the recipe's order: JSON keeps it, Orbax sorts.
        quantizers = {
            site: _quantizer_from(
                f"{path / METADATA}: the quantizer of {site}", metadata["quantizers"][site], tree["quantizers"][site]
            )
            for site in recipe.sites
        }
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{path / METADATA} describes no recipe that this cptv knows ({error}); use the cptv that wrote it"
        ) from None
    return QuantizedModel(model, recipe, quantizers)


def load_model(source: str, architecture: str | Architecture | None = None) -> Model | QuantizedModel:
    """Loads a model.

    Args:
        source: A checkpoint, a run directory, a raw file of weights (.safetensors, .npz, .pth) or a hub id.
        architecture: The architecture of a raw file: a timm name of the zoo, needed where the file's name does not
            contain it, or a user's own architecture. A checkpoint knows its own, which must then be the same.

    Returns:
        The model, quantized if it was saved so.

    Raises:
        InputError: The source is missing, damaged or of another kind, holds another architecture's weights, or is a
            checkpoint of a family that is not registered.

    Example:
        >>> model = load_model("hub:timm/deit_tiny_patch16_224.fb_in1k")
        >>> mine = load_model("mixer.safetensors", my_architecture)
    """
    wanted = architecture_named(architecture) if isinstance(architecture, str) else architecture
    path = Path(source)
    if path.is_dir():
        inner = path / "model"
        if not (path / METADATA).exists() and (path / "run.json").exists():
            if not inner.exists():
                raise InputError(f"{path} is a run that has not finished; run its command again to finish it")
            path = inner
        model = _load_checkpoint(path)
        found = (model.model if isinstance(model, QuantizedModel) else model).architecture
        if wanted is not None and found.name != wanted.name:
            raise InputError(
                f"{source} holds a {found.name}, not a {wanted.name}; leave out --arch or give the other file"
            )
        return model
    file = read_weights(source)
    chosen = wanted or guess_architecture(source)
    return Model(chosen, from_timm(file.tensors, chosen, file.source), file.source, file.sha256)


def load_float_model(source: str, architecture: str | Architecture | None = None) -> Model:
    """Loads a model as `load_model` does, and refuses a quantized one.

    Args:
        source: See `load_model`.
        architecture: See `load_model`.

    Returns:
        The model.

    Raises:
        InputError: As `load_model` does, and for a quantized model.

    Example:
        >>> model = load_float_model("vit_small.safetensors", "vit_small_patch16_224")
    """
    model = load_model(source, architecture)
    if isinstance(model, QuantizedModel):
        raise InputError(f"{source} is quantized already; give the float model that it was made from")
    return model
