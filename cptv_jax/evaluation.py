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
    """The accuracy of a model.

    Attributes:
        top1: Percent of images whose label has the highest logit.
        top5: Percent of images whose label is among the five highest logits.
        images: How many images were evaluated.

    Example:
        >>> print(Accuracy(top1=75.0, top5=93.75, images=16))
        top-1 75.00 %, top-5 93.75 % on 16 images
    """

    top1: float
    top5: float
    images: int

    def __str__(self) -> str:
        return f"top-1 {self.top1:.2f} %, top-5 {self.top5:.2f} % on {self.images} images"


def check_labels(stages: Sequence[Stage], images: Images) -> None:
    """Checks that images have labels that the model knows. Traces the model and runs nothing.

    Args:
        stages: The model's stages.
        images: The images.

    Raises:
        InputError: For unlabelled images or labels beyond the model's classes.
    """
    labels = images.require_labels()
    chunk = jax.ShapeDtypeStruct((1, *images.pixels.shape[1:]), jnp.float32)
    classes = jax.eval_shape(lambda x: forward(stages, x), chunk).logits.shape[1]
    if labels.max() >= classes:
        raise InputError(
            f"the images have label {labels.max()}, but the model knows classes 0 to {classes - 1}; "
            "give the images that belong to this model"
        )


def check_unseen(evaluation: Images, calibration: Images) -> None:
    """Checks that no evaluation image is a calibration image too, pixel for pixel.

    A model's accuracy on an image that it was fitted to says nothing about other images.

    Args:
        evaluation: The evaluation images.
        calibration: The calibration images.

    Raises:
        InputError: If an image is in both.
    """
    fitted = {digest(image) for image in calibration.pixels}
    both = [name for image, name in zip(evaluation.pixels, evaluation.names, strict=True) if digest(image) in fitted]
    if both:
        raise InputError(
            f"{len(both)} of the {len(evaluation)} evaluation images are calibration images too (the first is "
            f"{both[0]}); evaluate on others, or calibrate on others"
        )


def logits_of(stages: Sequence[Stage], images: Images, progress: bool = False, label: str = "evaluate") -> np.ndarray:
    """Computes the logits of all images, in pieces of one shape.

    Args:
        stages: The model's stages.
        images: The images.
        progress: Whether to show a progress bar on stderr.
        label: The progress bar's label.

    Returns:
        Logits, float32 [N, classes].
    """
    with bar(label, len(images), progress) as shown:
        return compute_outputs(stages, images.normalize, len(images), on_progress=shown.update).logits


def evaluate(stages: Sequence[Stage], images: Images, progress: bool = False, label: str = "evaluate") -> Accuracy:
    """Computes a model's top-1 and top-5 accuracy.

    Args:
        stages: The model's stages.
        images: Labelled images.
        progress: Whether to show a progress bar on stderr.
        label: The progress bar's label.

    Returns:
        The accuracy.

    Raises:
        InputError: For unlabelled images or labels beyond the model's classes.

    Example:
        >>> evaluate(model.stages(), images)
        Accuracy(top1=75.0, top5=93.75, images=16)
    """
    check_labels(stages, images)
    labels = images.require_labels()
    logits = logits_of(stages, images, progress, label)
    # Descending and stable: among equal logits the lower class comes first.
    ranked = np.argsort(-logits, 1, kind="stable")[:, :5]
    hits = ranked == labels[:, None]
    return Accuracy(100 * float(hits[:, 0].mean()), 100 * float(hits.any(1).mean()), len(images))
