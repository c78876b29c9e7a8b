"""Images from a directory: one folder per class, or a flat unlabelled folder."""

import logging
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cptv_jax.data.decoding import decode_all
from cptv_jax.data.images import Images
from cptv_jax.data.selection import choose
from cptv_jax.errors import InputError
from cptv_jax.models.preprocessing import Preprocessing

_EXTENSIONS = {".jpg", ".jpeg", ".png", ".webp", ".bmp"}
_WORDNET_ID = re.compile(r"n[0-9]{8}")
_CLASS_INDEX = re.compile(r"[0-9]{1,6}")
_IMAGENET_CLASSES = 1000

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Listing:
    """The image files of a directory.

    Attributes:
        files: Paths in sorted order.
        labels: Class indices, if the names of folders give them; else None.
        remark: Why there are no labels, or why they may differ from a model's classes; empty if all is well.
    """

    files: list[Path]
    labels: list[int] | None
    remark: str = ""


def load_folder(
    root: str | os.PathLike[str],
    preprocessing: Preprocessing,
    *,
    labels: bool,
    limit: int | None = None,
    need: int = 1,
    seed: int = 0,
    progress: bool = True,
) -> Images:
    """Loads the images of a directory.

    Args:
        root: The directory; `list_folder` has the rules for its content.
        preprocessing: The form that the model expects of its input.
        labels: Whether the names of folders must give labels; False discards them.
        limit: At most this many images, chosen from the sorted file names as `selection.choose` does.
        need: Fewer images than this are an error.
        seed: Seed of the choice.
        progress: Whether to show a progress bar.

    Returns:
        Images with uint8 pixels [N, size, size, 3].

    Raises:
        InputError: For a missing, empty or ambiguous folder, too few images, or an unreadable image.
    """
    root = Path(root).expanduser()
    listing = list_folder(root)
    if labels and listing.labels is None:
        raise InputError(
            f"labels are wanted but {root} {listing.remark}; put each image in a folder named by its "
            "class index (0, 1, ...) or WordNet id."
        )
    if labels and listing.remark:
        _logger.warning("%s %s", root, listing.remark)
    chosen = choose(len(listing.files), limit=limit, need=need, seed=seed, source=str(root))
    files = [listing.files[i] for i in chosen]
    names = tuple(str(file) for file in files)
    return Images(
        pixels=decode_all(names, files.__getitem__, preprocessing, progress=progress),
        labels=np.asarray(listing.labels, np.int32)[chosen] if labels else None,
        names=names,
        mean=preprocessing.mean,
        std=preprocessing.std,
    )


def list_folder(root: Path) -> Listing:
    """Lists every image file below a directory, with its label if the folders directly in it give one.

    If all folders are named by WordNet ids (n########), the label is the folder's rank in sorted order; if all are
    named by integers ("7", "0007"), it is that integer. Images directly in the directory, and folders with other
    names, give no labels. Hidden entries, other files, broken links and links back to a parent folder are skipped.

    Args:
        root: The directory.

    Returns:
        Files and labels.

    Raises:
        InputError: If root is not a directory, holds no image, or mixes these kinds.
    """
    if not os.path.exists(root):  # unlike pathlib's test, False for any path that no file can have
        raise InputError(f"the image folder {root} does not exist; check the path.")
    if not root.is_dir():
        raise InputError(f"{root} is a file, not a folder; give the folder that holds the images.")
    above = frozenset({os.path.realpath(root)})
    top, folders = _entries(root, above)
    images = {folder: list(_images_below(folder, above)) for folder in folders}
    wordnet = [folder for folder in folders if _WORDNET_ID.fullmatch(folder.name)]
    indexed = [folder for folder in folders if _CLASS_INDEX.fullmatch(folder.name)]
    classes = {*wordnet, *indexed}
    other = [folder for folder in folders if images[folder] and folder not in classes]
    if not top and not any(images.values()):
        raise InputError(f"the folder {root} holds no images ({', '.join(sorted(_EXTENSIONS))}); check the path.")
    kinds = [found[0].name for found in (wordnet, indexed, other, top) if found]
    if len(kinds) > 1:
        raise InputError(
            f"{root} mixes kinds of entries ({', '.join(kinds)}); keep only WordNet-id folders, only class-index "
            "folders, or only images."
        )
    if top:
        return Listing(top, None, "is a flat folder without class folders")
    files = [file for folder in folders for file in images[folder]]
    if other:
        return Listing(files, None, f"has the folder {other[0].name!r}, neither a class index nor a WordNet id")
    if indexed:
        return Listing(files, [int(folder.name) for folder in folders for _ in images[folder]])
    remark = ""
    if len(wordnet) != _IMAGENET_CLASSES:
        remark = (
            f"has {len(wordnet)} WordNet-id folders, labelled by their sorted order; for a model of all "
            f"{_IMAGENET_CLASSES} ImageNet classes rename them to class indices."
        )
    return Listing(files, [rank for rank, folder in enumerate(wordnet) for _ in images[folder]], remark)


def _images_below(folder: Path, ancestors: frozenset[str]) -> Iterator[Path]:
    """Yields the image files in `folder` and, after them, those in its folders, each level in sorted order."""
    ancestors = ancestors | {os.path.realpath(folder)}
    files, folders = _entries(folder, ancestors)
    yield from files
    for inner in folders:
        yield from _images_below(inner, ancestors)


def _entries(folder: Path, ancestors: frozenset[str]) -> tuple[list[Path], list[Path]]:
    """Lists the visible image files and folders directly in `folder`, sorted, without folders that lead back up.

    Returns:
        Files and folders.

    Raises:
        InputError: If the folder cannot be read.
    """
    try:
        visible = [folder / name for name in sorted(os.listdir(folder)) if not name.startswith(".")]
    except OSError as error:
        raise InputError(f"the folder {folder} cannot be read ({error.strerror}); check its permissions.") from error
    # os.path's tests answer False for broken and circular links, where pathlib's may raise
    files = [path for path in visible if path.suffix.lower() in _EXTENSIONS and os.path.isfile(path)]
    folders = [path for path in visible if os.path.isdir(path) and os.path.realpath(path) not in ancestors]
    return files, folders
