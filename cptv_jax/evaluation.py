"""Accuracy of a model on labelled images."""

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from cptv_jax.data import Images
from cptv_jax.errors import InputError
from cptv_jax.progress import bar
from cptv_jax.runtime.forward import compute_outputs, forward
from cptv_jax.runtime.stages import Stage
from cptv_jax.storage.files import digest


@dataclass(frozen=True)
class Accuracy:
    """top1, top5: percent. images: how many were evaluated."""

    top1: float
    top5: float
    images: int

    def __str__(self) -> str:
        return f"top-1 {self.top1:.2f} %, top-5 {self.top5:.2f} % on {self.images} images"


def check_labels(stages: Sequence[Stage], images: Images) -> None:
    """Raises InputError for unlabelled images or labels beyond the model's classes. Traces the model, runs nothing."""
    labels = images.require_labels()
    chunk = jax.ShapeDtypeStruct((1, *images.pixels.shape[1:]), jnp.float32)
    classes = jax.eval_shape(lambda x: forward(stages, x), chunk).logits.shape[1]
    if labels.max() >= classes:
        raise InputError(
            f"the images have label {labels.max()}, but the model knows classes 0 to {classes - 1}; "
            "give the images that belong to this model"
        )


def check_unseen(evaluation: Images, calibration: Images) -> None:
    """Raises InputError where evaluation images are calibration images too, pixel for pixel: a model that was fitted to
    an image says nothing about others by it.
    """
    fitted = {digest(image) for image in calibration.pixels}
    both = [name for image, name in zip(evaluation.pixels, evaluation.names, strict=True) if digest(image) in fitted]
    if both:
        raise InputError(
            f"{len(both)} of the {len(evaluation)} evaluation images are calibration images too (the first is "
            f"{both[0]}); evaluate on others, or calibrate on others"
        )


def logits_of(stages: Sequence[Stage], images: Images, progress: bool = False, label: str = "evaluate") -> np.ndarray:
    """Logits [N, classes] of all images, computed in pieces of one shape."""
    with bar(label, len(images), progress) as shown:
        return compute_outputs(stages, images.normalize, len(images), on_progress=shown.update).logits


def evaluate(stages: Sequence[Stage], images: Images, progress: bool = False, label: str = "evaluate") -> Accuracy:
    """Top-1 and top-5 accuracy. Raises InputError for unlabelled images or labels beyond the model's classes."""
    check_labels(stages, images)
    labels = images.require_labels()
    logits = logits_of(stages, images, progress, label)
    # Descending and stable: of equal logits the lower class counts first.
    ranked = np.argsort(-logits, 1, kind="stable")[:, :5]
    hits = ranked == labels[:, None]
    return Accuracy(100 * float(hits[:, 0].mean()), 100 * float(hits.any(1).mean()), len(images))
