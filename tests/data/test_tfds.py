"""Reads data sets that tensorflow-datasets itself prepares here, offline and without TensorFlow."""

import io
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from cptv_jax.data import load, load_tfds, preprocess
from cptv_jax.data.images import Images
from cptv_jax.errors import InputError
from cptv_jax.models.preprocessing import Preprocessing

PHOTOS = np.random.default_rng(0).integers(0, 256, (6, 40, 50, 3), np.uint8)
LABELS = {"validation": [3, 0, 2, 1, 3, 2], "unlabelled": [-1] * 6}


def png(photo: np.ndarray) -> io.BytesIO:
    """A file: tfds would need TensorFlow to encode an array."""
    file = io.BytesIO()
    Image.fromarray(photo).save(file, "PNG")
    file.seek(0)
    return file


with (
    tfds.core.registered.skip_registration()
):  # so that reading finds only the prepared folder, as a user's program does

    class Photos(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self) -> tfds.core.DatasetInfo:
            features = {
                "image": tfds.features.Image(shape=(None, None, 3)),
                "label": tfds.features.ClassLabel(num_classes=4),
            }
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

        def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
            return {split: self._generate_examples(split) for split in LABELS}

        def _generate_examples(self, split: str) -> Iterator[tuple[int, dict[str, Any]]]:
            for i, label in enumerate(LABELS[split]):
                yield i, {"image": png(PHOTOS[i]), "label": label}

    class Captions(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self) -> tfds.core.DatasetInfo:
            features = tfds.features.FeaturesDict({"caption": tfds.features.Text()})
            return tfds.core.DatasetInfo(builder=self, features=features)

        def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
            return {"train": self._generate_examples()}

        def _generate_examples(self) -> Iterator[tuple[int, dict[str, Any]]]:
            yield 0, {"caption": "no picture"}

    class BarePhotos(Photos):
        def _info(self) -> tfds.core.DatasetInfo:
            features = tfds.features.FeaturesDict({"image": tfds.features.Image(shape=(None, None, 3))})
            return tfds.core.DatasetInfo(builder=self, features=features)

        def _generate_examples(self, split: str) -> Iterator[tuple[int, dict[str, Any]]]:
            for i, photo in enumerate(PHOTOS):
                yield i, {"image": png(photo)}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("tfds")
    for kind in (Photos, Captions, BarePhotos):
        kind(data_dir=folder, file_format="array_record").download_and_prepare()
    return str(folder)


def read(
    prepared: str, small: Preprocessing, name: str = "photos", split: str = "validation", **options: Any
) -> Images:
    return load_tfds(name, split, small, data_dir=prepared, **{"labels": True, "progress": False, **options})


def test_examples_come_with_their_pixels_and_labels(prepared: str, small: Preprocessing) -> None:
    images = read(prepared, small)
    expected = {preprocess(Image.fromarray(photo), small).tobytes(): i for i, photo in enumerate(PHOTOS)}
    which = [expected[pixels.tobytes()] for pixels in images.pixels]  # tfds shuffles when it prepares
    assert sorted(which) == list(range(6))
    assert images.require_labels().tolist() == [LABELS["validation"][i] for i in which]
    assert read(prepared, small, labels=False).labels is None
    assert read(prepared, small, name="bare_photos", labels=False).labels is None


def test_slices_and_limits_choose_among_the_examples(prepared: str, small: Preprocessing) -> None:
    images = read(prepared, small)
    np.testing.assert_array_equal(read(prepared, small, split="validation[2:5]").pixels, images.pixels[2:5])
    some = read(prepared, small, limit=4, seed=3)
    where = [images.names.index(name) for name in some.names]
    assert len(set(where)) == 4
    np.testing.assert_array_equal(some.labels, images.require_labels()[where])
    np.testing.assert_array_equal(some.pixels, images.pixels[where])


def test_a_source_string_may_slice_the_split(prepared: str, small: Preprocessing) -> None:
    images = load(f"tfds:photos:validation[:3]:{prepared}", small, labels=True, progress=False)
    assert len(images) == 3


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"name": "no_such_set"}, "'no_such_set' cannot be opened in {folder}.*prepare"),
        ({"name": "mnist"}, "'mnist' (is not prepared|was not found) in {folder}.*prepare"),
        ({"split": "holiday"}, "split 'holiday'.*validation"),
        ({"split": "validation[zz"}, "split 'validation\\[zz'"),
        ({"split": "validation[:900]"}, "split .*900"),
        ({"name": "captions", "split": "train"}, "'captions' has no 8-bit image feature.*caption"),
        ({"name": "bare_photos"}, "'bare_photos' has no integer feature `label`"),
        ({"split": "unlabelled"}, "carries no labels"),
        ({"need": 7}, "6 images but 7"),
    ],
)
def test_what_cannot_be_read_is_said_in_one_sentence(
    prepared: str, small: Preprocessing, options: Any, said: str
) -> None:
    with pytest.raises(InputError, match=said.format(folder=prepared)) as raised:
        read(prepared, small, **options)
    assert "\n" not in str(raised.value)


def copied(prepared: str, folder: Path) -> Path:
    """A copy of one prepared data set that a test may damage."""
    return Path(shutil.copytree(f"{prepared}/photos/1.0.0", folder / "photos" / "1.0.0"))


@pytest.mark.parametrize(
    "file", ["photos-validation.array_record-00000-of-00001", "dataset_info.json", "features.json"]
)
@pytest.mark.parametrize("damage", ["empty", "gone"])
def test_a_damaged_folder_is_named_with_the_remedy(
    prepared: str, small: Preprocessing, tmp_path: Path, file: str, damage: str
) -> None:
    path = copied(prepared, tmp_path) / file
    if damage == "empty":
        path.write_bytes(b"")
    else:
        path.unlink()
    with pytest.raises(InputError, match=f"{tmp_path}.*prepare") as raised:
        read(str(tmp_path), small)
    assert "\n" not in str(raised.value)


def test_a_missing_package_is_named(small: Preprocessing, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    with pytest.raises(InputError, match="pip install tensorflow-datasets"):
        load_tfds("photos", "validation", small, labels=False)


def test_data_prepared_for_sequential_reading_only_is_refused(
    prepared: str, small: Preprocessing, tmp_path: Path
) -> None:
    file = copied(prepared, tmp_path) / "dataset_info.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"fileFormat": "tfrecord"}))
    with pytest.raises(InputError, match="array_record"):
        read(str(tmp_path), small)
