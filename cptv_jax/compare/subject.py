"""The subject of a comparison: model, recipe and data of a recording, recomputed from the set's files."""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from cptv_jax.calibration.statistics import calibrate
from cptv_jax.compare.checks import (
    FLOAT_LOGITS,
    Check,
    Tolerances,
    exceeds,
    find_tolerances,
    fraction,
    logits_checks,
    max_abs,
)
from cptv_jax.compare.interchange import ArrayFile, Meta, Recording, read_arrays
from cptv_jax.errors import InputError
from cptv_jax.models.architecture import Architecture, sites_of
from cptv_jax.models.preprocessing import Preprocessing
from cptv_jax.models.timm_weights import from_timm
from cptv_jax.models.vit import ViTConfig
from cptv_jax.models.vit_family import VIT
from cptv_jax.models.weight_files import read_weights
from cptv_jax.quantized.model import Model, QuantizedModel
from cptv_jax.recipe.resolve import RecipeConfig, resolve
from cptv_jax.recipe.spec import MAX_BITS, MIN_BITS, Recipe
from cptv_jax.runtime.forward import forward
from cptv_jax.runtime.stages import Output, Stage

Quantize = Callable[[Model, Sequence[Array], Recipe], QuantizedModel]
Images = Float[np.ndarray, "batch height width channels"]
_PUBLISHED_OBSERVERS = ("minmax", "ema", "percentile", "omse")
_DEEPEST = 1000  # blocks; a larger number means that meta is damaged
_FORWARD_IMAGES = 512  # images at once; results do not depend on it


@dataclass(frozen=True)
class Subject:
    """Everything that a recording's meta asks to be recomputed.

    Attributes:
        quantize: Makes the quantized model from the float model, the batches and the recipe, as the reference does.
        model: The float model.
        recipe: The recipe.
        calibration: Batches of images [batch, height, width, channels] in order, the last perhaps smaller.
        test_images: [images, height, width, channels].
        test_labels: [images].
        limits: The file's tolerances.
    """

    quantize: Quantize
    model: Model
    recipe: Recipe
    calibration: tuple[Images, ...]
    test_images: Images
    test_labels: Int[np.ndarray, " images"]
    limits: Tolerances

    @cached_property
    def quantized(self) -> QuantizedModel:
        """The model, calibrated as the recording's was; the first use takes most of a comparison's time."""
        return self.quantize(self.model, [jnp.asarray(batch) for batch in self.calibration], self.recipe)

    @property
    def config(self) -> ViTConfig:
        """The sizes of the model."""
        config: ViTConfig = self.model.architecture.config
        return config

    def logits(self, stages: tuple[Stage, ...] | list[Stage]) -> Float[np.ndarray, "images classes"]:
        """Computes the logits of the test images.

        Args:
            stages: The stages of a model.

        Returns:
            Logits, float32 [images, classes].
        """
        parts = range(0, len(self.test_images), _FORWARD_IMAGES)
        return np.concatenate(
            [np.asarray(forward(stages, self.test_images[i : i + _FORWARD_IMAGES]).logits) for i in parts]
        )

    def targets(self, stages: tuple[Stage, ...]) -> list[Output]:
        """Computes the outputs for every calibration batch.

        Args:
            stages: The stages of a model.

        Returns:
            One output per batch.
        """
        return [forward(stages, batch) for batch in self.calibration]

    def recorded_logits(self, recording: Recording, key: str) -> Float[np.ndarray, "images classes"]:
        """Reads the logits of the test images from a recording.

        Args:
            recording: The recording.
            key: The array's key.

        Returns:
            Logits [images, classes].
        """
        return recording.array(key, len(self.test_images), self.config.num_classes)

    def quantized_logit_checks(
        self, recording: Recording, group: str, stages: tuple[Stage, ...] | list[Stage], key: str, top1: str
    ) -> list[Check]:
        """Compares the logits of a quantized model (step 4).

        Args:
            recording: The recording.
            group: The rows' group.
            stages: The stages of our model.
            key: The key of the recorded logits.
            top1: The key of the recorded top-1, in percent.

        Returns:
            The rows.
        """
        ours, recorded = self.logits(stages), self.recorded_logits(recording, key)
        quantizer = stages[-1].state["quantizers"].get("fc")
        step = 1.0 if quantizer is None else np.asarray(quantizer.scale)
        equal = 1.0 - fraction(exceeds((ours - recorded) / step, 0.5))
        return logits_checks(group, ours, recorded, self.limits, self.test_labels, recording.scalar(top1), equal)

    def float_checks(self, recording: Recording) -> list[Check]:
        """Compares the float model's logits, which have no steps that could flip.

        Args:
            recording: The recording.

        Returns:
            One row.
        """
        difference = self.logits(self.model.stages()) - self.recorded_logits(recording, "fp_logits")
        name = "fp_logits"
        return [Check("float model", name, max_abs(difference), FLOAT_LOGITS, "absolute", max_abs(difference))]


def architecture_of(meta: Meta) -> Architecture:
    """Builds the architecture that meta.model describes.

    Args:
        meta: The recording's meta.

    Returns:
        The architecture.

    Raises:
        InputError: For sizes that do not make a ViT.
    """
    meta.choice("model.family", ("vit",))
    meta.choice("model.gelu", ("erf",))
    channels = meta.integer("model.in_chans")
    config = ViTConfig(
        image_size=meta.integer("model.img_size"),
        patch_size=meta.integer("model.patch_size"),
        in_channels=channels,
        num_classes=meta.integer("model.num_classes"),
        width=meta.integer("model.embed_dim"),
        depth=meta.integer("model.depth", most=_DEEPEST),
        heads=meta.integer("model.num_heads"),
        mlp_ratio=meta.number("model.mlp_ratio"),
        qkv_bias=meta.flag("model.qkv_bias"),
        layer_norm_epsilon=meta.number("model.layer_norm_eps"),
    )
    if config.width % config.heads:
        raise InputError(f"{meta.path}: meta.model.embed_dim {config.width} does not divide by {config.heads} heads")
    if config.image_size % config.patch_size:
        raise InputError(
            f"{meta.path}: meta.model.img_size {config.image_size} does not divide by patch_size {config.patch_size}"
        )
    # The images are already normalized; only the number of channels matters here.
    flat = Preprocessing(config.image_size, mean=(0.5,) * channels, std=(0.5,) * channels)
    return Architecture("the model in meta", VIT, config, flat)


def read_recipe(meta: Meta, architecture: Architecture) -> Recipe:
    """Builds the recipe that meta's options describe.

    Args:
        meta: The recording's meta.
        architecture: The model's architecture.

    Returns:
        The recipe.

    Raises:
        InputError: For an unknown option, or one that the reference does not have.
    """
    bits = {name: meta.integer(f"bits.{name}", MIN_BITS, MAX_BITS) for name in ("weights", "activations", "softmax")}
    meta.choice("calibration.score_batch", ("last",))
    weight_observer = meta.choice("observer.weights", _PUBLISHED_OBSERVERS)
    if weight_observer == "percentile":
        raise InputError(f"{meta.path}: meta.observer.weights is 'percentile', which works per tensor only")
    config = RecipeConfig(
        preset="evol-q",  # every field that a preset fills is given below
        weight_bits=bits["weights"],
        activation_bits=bits["activations"],
        softmax_bits=bits["softmax"],
        weight_observer=weight_observer,
        activation_observer=meta.choice("observer.activations", _PUBLISHED_OBSERVERS),
        weight_signed=not meta.flag("weights_unsigned"),
        bias_correction=meta.flag("bias_correction"),
        power_of_two_factor=meta.flag("ptf"),
        integer_layer_norm=meta.flag("integer_layer_norm"),
        log_int_softmax=meta.flag("log_int_softmax"),
        quantize_input=meta.flag("quantize_input"),
    )
    recipe = resolve(config, sites_of(architecture))
    # Our recipes have integer LayerNorms only with power-of-two factors; a recording may have them without.
    return dataclasses.replace(recipe, integer_layer_norm=meta.flag("integer_layer_norm"))


def read_model(meta: Meta) -> Model:
    """Reads the float model from the file of weights that meta names.

    Args:
        meta: The recording's meta.

    Returns:
        The model.
    """
    file = read_weights(str(meta.neighbour("weights")))
    architecture = architecture_of(meta)
    return Model(architecture, from_timm(file.tensors, architecture, file.source), file.source, file.sha256)


def calibrate_model(model: Model, batches: Sequence[Array], recipe: Recipe) -> QuantizedModel:
    """Calibrates a model, as the published code of Evol-Q and FQ-ViT does before any search.

    Args:
        model: The float model.
        batches: Calibration images [batch, height, width, channels].
        recipe: The recipe.

    Returns:
        The quantized model.
    """
    return QuantizedModel(model, recipe, calibrate(model, batches, recipe))


def prepare(
    recording: Recording,
    recipe_of: Callable[[Meta, Architecture], Recipe] = read_recipe,
    quantize: Quantize = calibrate_model,
) -> Subject:
    """Reads the set's weights and data.

    Args:
        recording: The recording.
        recipe_of: Builds the recipe that the reference's meta describes.
        quantize: See Subject.

    Returns:
        The subject.

    Raises:
        InputError: If a file or key is missing, or shapes and ranges do not fit.
    """
    meta = recording.meta
    model = read_model(meta)
    config: ViTConfig = model.architecture.config
    recipe = recipe_of(meta, model.architecture)
    path = meta.neighbour("data")
    data = ArrayFile(path, read_arrays(path))
    side, channels = config.image_size, config.in_channels
    images, tests = (data.array(f"{name}_images", None, channels, side, side) for name in ("calib", "test"))
    if not len(tests):
        raise InputError(f"{path}: array 'test_images' is empty")
    labels = data.integers("test_labels", len(tests))
    used = meta.index_range("calibration.images", len(images), f"calibration images in {path.name}")
    size = meta.integer("calibration.batch")
    batches = tuple(_channels_last(images[i : min(i + size, used.stop)]) for i in used[::size])
    limits = find_tolerances(recording.reference, recording.path.stem, model.sha256)
    return Subject(quantize, model, recipe, batches, _channels_last(tests), labels, limits)


def _channels_last(images: np.ndarray) -> Images:
    return np.ascontiguousarray(images.transpose(0, 2, 3, 1), np.float32)
