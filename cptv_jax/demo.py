"""The embedded demo: a small ViT trained on scikit-learn's digits, quantized at 3 bits and improved. Offline."""

from pathlib import Path

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from cptv_jax.config.schema import CalibrationConfig, QuantizeConfig, SearchConfig, SpaceConfig
from cptv_jax.data import Images, load_digits
from cptv_jax.errors import InputError
from cptv_jax.interpreters import Float as FloatOperations
from cptv_jax.interpreters import Tensor
from cptv_jax.models.architecture import Architecture, Weights
from cptv_jax.models.preprocessing import Preprocessing
from cptv_jax.models.vit import ViTConfig
from cptv_jax.models.vit_family import VIT
from cptv_jax.models.walk import run_stages
from cptv_jax.pipeline.outcome import Quantization
from cptv_jax.pipeline.quantize import quantize
from cptv_jax.progress import bar
from cptv_jax.quantized.model import Model
from cptv_jax.recipe.resolve import RecipeConfig
from cptv_jax.search import Generational
from cptv_jax.storage.files import lock
from cptv_jax.storage.models import load_float_model, save_model

DIGITS_VIT = Architecture(
    "digits_vit",
    VIT,
    ViTConfig(image_size=32, patch_size=8, num_classes=10, width=64, depth=3, heads=4),
    Preprocessing(image_size=32, crop_fraction=1.0, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)),
)

_EPOCHS = 40
_BATCH = 64
_LEARNING_RATE = 2e-3
_SHIFT = 3  # pixels; images have 32


def compute_logits(weights: Weights, images: Float[Array, "batch 32 32 3"]) -> Float[Array, "batch 10"]:
    """Runs the float forward pass, for training.

    Args:
        weights: The weights of the demo's model.
        images: Normalized images, float32 [batch, 32, 32, 3].

    Returns:
        Logits, float32 [batch, 10].
    """
    return run_stages(DIGITS_VIT, weights, FloatOperations(), Tensor(images)).logits


def train(images: Images, seed: int, epochs: int = _EPOCHS, progress: bool = False) -> Model:
    """Trains a digits ViT with AdamW on labelled images, each shifted at random.

    Args:
        images: The images.
        seed: Seed of the weights, the order of images and the shifts.
        epochs: How often each image is seen.
        progress: Whether to show a progress bar on stderr.

    Returns:
        The trained model.
    """
    labels = jnp.asarray(images.require_labels())
    pixels = jnp.asarray(images.normalize(0, len(images)))
    size = pixels.shape[1:]
    margin = (_SHIFT, _SHIFT)
    padded = jnp.pad(pixels, ((0, 0), margin, margin, (0, 0)), constant_values=-1.0)  # -1 is a digit's background
    steps = len(images) // _BATCH
    schedule = optax.cosine_onecycle_schedule(steps * epochs, _LEARNING_RATE)
    optimizer = optax.adamw(schedule, weight_decay=0.05)

    def loss_of(weights: Weights, x: Float[Array, "batch 32 32 3"], y: Int[Array, " batch"]) -> Float[Array, ""]:
        losses = optax.softmax_cross_entropy_with_integer_labels(compute_logits(weights, x), y)
        return jnp.mean(losses)

    @jax.jit
    def epoch(weights: Weights, state: optax.OptState, key: Array) -> tuple[Weights, optax.OptState]:
        shuffle, shift = jax.random.split(key)
        order = jax.random.permutation(shuffle, len(images))[: steps * _BATCH].reshape(steps, _BATCH)
        shifts = jax.random.randint(shift, (steps, _BATCH, 2), 0, 2 * _SHIFT + 1)

        def step(carry: tuple[Weights, optax.OptState], chosen: tuple[Array, Array]) -> tuple[tuple, None]:
            weights, state = carry
            rows, moved = chosen
            x = jax.vmap(lambda image, by: jax.lax.dynamic_slice(image, (by[0], by[1], 0), size))(padded[rows], moved)
            updates, state = optimizer.update(jax.grad(loss_of)(weights, x, labels[rows]), state, weights)
            return (optax.apply_updates(weights, updates), state), None

        return jax.lax.scan(step, (weights, state), (order, shifts))[0]

    weights = DIGITS_VIT.initialize(seed)
    state = optimizer.init(weights)
    with bar("train on digits", epochs, progress) as shown:
        for index in range(epochs):
            weights, state = epoch(weights, state, jax.random.fold_in(jax.random.key(seed), index))
            jax.block_until_ready(state)
            shown.update(1)
    return Model(DIGITS_VIT, weights, "trained by cptv demo on scikit-learn's digits")


DEMO_CONFIG = QuantizeConfig(
    recipe=RecipeConfig(preset="evol-q", weight_bits=3),
    calibration=CalibrationConfig(images=300, batch=50),
    search=SearchConfig(
        strategy=Generational(passes=3, children=8, rounds=3, sigma=0.02), space=SpaceConfig(sites=("blocks.*.weight",))
    ),
)


def run_demo(
    out: Path, config: QuantizeConfig = DEMO_CONFIG, *, epochs: int = _EPOCHS, progress: bool = True
) -> Quantization:
    """Trains (or reloads from an interrupted demo), quantizes, searches and evaluates, and writes a report.

    Args:
        out: The folder of the run; the trained model is kept next to it, as `{out}-model`.
        config: The configuration.
        epochs: Epochs of training.
        progress: Whether to show progress bars on stderr.

    Returns:
        The quantization and its accuracies.

    Raises:
        InputError: If the folder holds a run without the demo's model, or the model next to it is another.
    """
    checkpoint = out.with_name(f"{out.name}-model")
    with lock(out):  # a bad folder is reported before the training, and two demos never train one model
        if (out / "run.json").exists() and not checkpoint.exists():
            raise InputError(f"{out} holds a run, but {checkpoint}, the demo's model, is absent; choose another --out")
        if checkpoint.exists():
            model = load_float_model(str(checkpoint))
            if model.architecture != DIGITS_VIT:
                raise InputError(
                    f"{checkpoint} holds a {model.architecture.name}, not the demo's model; choose another --out"
                )
        else:
            model = train(load_digits("train"), config.seed, epochs, progress)
            save_model(checkpoint, model)
    calibration, test = load_digits("calibration").without_labels(), load_digits("test")
    return quantize(model, calibration, config, out=out, evaluation=test, progress=progress)
