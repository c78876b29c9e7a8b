"""Loads images from a source that is written as text."""

import re

from cptv_jax.data.digits import IMAGE_SIZE, load_digits
from cptv_jax.data.folder import load_folder
from cptv_jax.data.images import Images
from cptv_jax.data.selection import choose
from cptv_jax.data.synthetic import load_synthetic
from cptv_jax.data.tfds import load_tfds
from cptv_jax.errors import InputError
from cptv_jax.models.preprocessing import Preprocessing

# A split may hold colons inside brackets: tfds:mnist:test[:500]:/data/tfds
_TFDS = re.compile(r"tfds:(?P<name>[^:]+):(?P<split>(?:[^:\[]|\[[^\]]*\])+)(?::(?P<data_dir>.+))?")


def load(
    source: str,
    preprocessing: Preprocessing,
    *,
    labels: bool,
    limit: int | None = None,
    need: int = 1,
    seed: int = 0,
    progress: bool = True,
) -> Images:
    """Loads the images of a source, ready for a model.

    Args:
        source: A directory; "tfds:name:split" or "tfds:name:split:data_dir"; "digits:train", "digits:calibration" or
            "digits:test"; "synthetic:noise" or "synthetic:textures", which have no labels.
        preprocessing: The form that the model expects of its input.
        labels: Whether labels are required; False leaves them out, because calibration images must not carry any.
        limit: At most this many images, chosen by the seed; None takes all.
        need: Fewer images than this are an error.
        seed: Seed of the choice.
        progress: Whether to show a progress bar on stderr.

    Returns:
        The images, in memory.

    Raises:
        InputError: For a source that is missing, malformed, too small or unreadable.

    Example:
        >>> calibration = load("photographs/", model.architecture.preprocessing, labels=False, limit=1000)
    """
    if not source:  # an empty path would be the working directory
        raise InputError("the source of images is empty; give a directory, tfds:name:split or digits:test.")
    kind, _, rest = source.partition(":")
    if kind == "digits":
        return _digits(rest, preprocessing, labels=labels, limit=limit, need=need, seed=seed)
    if kind == "synthetic":
        if labels:
            raise InputError(f"{source} has no labels; give a labelled directory, tfds:name:split or digits:test.")
        return load_synthetic(rest, preprocessing, limit=limit, need=need, seed=seed)
    if kind != "tfds":
        return load_folder(source, preprocessing, labels=labels, limit=limit, need=need, seed=seed, progress=progress)
    parts = _TFDS.fullmatch(source)
    if parts is None:
        raise InputError(f"the source {source!r} is malformed; write tfds:name:split or tfds:name:split:data_dir.")
    return load_tfds(
        parts["name"],
        parts["split"],
        preprocessing,
        data_dir=parts["data_dir"],
        labels=labels,
        limit=limit,
        need=need,
        seed=seed,
        progress=progress,
    )


def _digits(
    split: str, preprocessing: Preprocessing, *, labels: bool, limit: int | None, need: int, seed: int
) -> Images:
    images = load_digits(split)
    if preprocessing.image_size != IMAGE_SIZE:
        raise InputError(
            f"digits:{split} are {IMAGE_SIZE} x {IMAGE_SIZE} pixels but the model expects {preprocessing.image_size}; "
            "give a folder or tfds: source."
        )
    images = images.take(choose(len(images), limit=limit, need=need, seed=seed, source=f"digits:{split}"))
    return images if labels else images.without_labels()
