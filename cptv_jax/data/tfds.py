"""Images from tensorflow-datasets' prepared data, read without TensorFlow."""

from io import BytesIO
from threading import Lock
from typing import Any

import numpy as np

from cptv_jax.data.decoding import decode_all
from cptv_jax.data.images import Images
from cptv_jax.data.selection import choose
from cptv_jax.errors import InputError
from cptv_jax.models.preprocessing import Preprocessing


def load_tfds(
    name: str,
    split: str,
    preprocessing: Preprocessing,
    *,
    data_dir: str | None = None,
    labels: bool,
    limit: int | None = None,
    need: int = 1,
    seed: int = 0,
    progress: bool = True,
) -> Images:
    """Loads the images of a data set that tensorflow-datasets has prepared. Downloads and prepares nothing.

    Args:
        name: The data set, with its config if any ("imagenet_v2/matched-frequency").
        split: In tfds's syntax ("validation[:500]").
        preprocessing: The form that the model expects of its input.
        data_dir: The folder where the data set was prepared; None means tfds's default.
        labels: Whether the feature `label` is required.
        limit: At most this many images, chosen as `selection.choose` does.
        need: Fewer images than this are an error.
        seed: Seed of the choice.
        progress: Whether to show a progress bar.

    Returns:
        Images with uint8 pixels [N, size, size, 3].

    Raises:
        InputError: If tfds is missing, the data set is not prepared in a format with random access, the split is
            unknown, the feature `image` (or a required `label`) is missing, or an image is unreadable.
    """
    tfds = _import_tfds()
    builder = _open_prepared(tfds, name, data_dir)
    _check_features(tfds, builder, name, labels)
    try:
        # Encoded bytes, not tfds's decoder: the same file gives the same pixels here as from a folder.
        records = builder.as_data_source(split=split, decoders={"image": tfds.decode.SkipDecoding()})
    except NotImplementedError as error:
        raise InputError(
            f"tfds data set {name!r} in {builder.data_path} is not stored as array_record; prepare it again with "
            "file_format='array_record'."
        ) from error
    except ValueError as error:
        raise InputError(
            f"split {split!r} does not fit tfds data set {name!r} ({_first_line(error)}); "
            f"its splits are {', '.join(builder.info.splits)}."
        ) from error
    except RuntimeError as error:
        raise _damage_error(builder, name, error) from error
    chosen = choose(len(records), limit=limit, need=need, seed=seed, source=f"tfds:{name}:{split}")
    names = tuple(f"tfds:{name}:{split} example {i}" for i in chosen)
    found = np.zeros(len(chosen), np.int32)
    lock = Lock()  # the record reader opens its files lazily, which two threads must not do at once

    def open_record(index: int) -> BytesIO:
        try:
            with lock:
                example = records[int(chosen[index])]
        except Exception as error:  # the record reader and the protobuf parser raise their own types
            raise _damage_error(builder, name, error) from error
        if labels:
            found[index] = example["label"]
        return BytesIO(example["image"])

    pixels = decode_all(names, open_record, preprocessing, progress=progress)
    if labels and (found < 0).any():
        raise InputError(f"split {split!r} of tfds data set {name!r} carries no labels (-1); choose a labelled split.")
    return Images(pixels, found if labels else None, names, preprocessing.mean, preprocessing.std)


def _import_tfds() -> Any:
    try:
        import tensorflow_datasets  # imported here: other sources work without it, and the import takes seconds
    except ImportError as error:
        raise InputError(f"reading tfds: sources needs `pip install tensorflow-datasets` ({error}).") from error
    return tensorflow_datasets


def _open_prepared(tfds: Any, name: str, data_dir: str | None) -> Any:
    """Opens a data set that is prepared on disk.

    Returns:
        Its builder.

    Raises:
        InputError: If the data set cannot be opened or is not prepared.
    """
    shown = data_dir or "tfds's default folder (~/tensorflow_datasets or $TFDS_DATA_DIR)"
    remedy = "prepare it with `tfds build --file_format=array_record`, or give the folder as tfds:name:split:data_dir"
    try:
        builder = tfds.builder(name, data_dir=data_dir)
    except Exception as error:  # an unknown name or config, a damaged folder, or whatever the set's own code raises
        reason = _first_line(error)
        raise InputError(f"tfds data set {name!r} cannot be opened in {shown} ({reason}); {remedy}.") from error
    if not builder.is_prepared():
        raise InputError(f"tfds data set {name!r} is not prepared in {builder.data_path}; {remedy}.")
    return builder


def _check_features(tfds: Any, builder: Any, name: str, labels: bool) -> None:
    features = dict(builder.info.features.items())
    image = features.get("image")
    if not isinstance(image, tfds.features.Image) or image.np_dtype != np.uint8:
        raise InputError(
            f"tfds data set {name!r} has no 8-bit image feature `image` (it has {', '.join(features)}); "
            "choose an image classification data set."
        )
    if labels:
        label = features.get("label")
        if label is None or label.shape != () or np.dtype(label.np_dtype).kind not in "iu":
            raise InputError(
                f"labels are wanted but tfds data set {name!r} has no integer feature `label`; choose one that has."
            )


def _damage_error(builder: Any, name: str, error: Exception) -> InputError:
    return InputError(
        f"tfds data set {name!r} in {builder.data_path} is damaged ({_first_line(error)}); delete and prepare it again."
    )


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
