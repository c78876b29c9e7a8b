from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from cptv_jax.data import load, source
from cptv_jax.errors import InputError
from cptv_jax.models.preprocessing import Preprocessing

DIGITS = Preprocessing(image_size=32)


def test_a_directory_is_read_as_a_folder(tmp_path: Path, paint: Callable[..., Path], small: Preprocessing) -> None:
    paint(tmp_path / "4" / "a.png", 40)
    images = load(str(tmp_path), small, labels=True, progress=False)
    assert images.require_labels().tolist() == [4]


def test_digits_obey_labels_limit_and_need() -> None:
    assert load("digits:test", DIGITS, labels=False).labels is None
    some = load("digits:test", DIGITS, labels=True, limit=9, seed=5)
    everything = load("digits:test", DIGITS, labels=True)
    where = [everything.names.index(name) for name in some.names]
    assert len(set(where)) == 9
    np.testing.assert_array_equal(some.labels, everything.require_labels()[where])
    with pytest.raises(InputError, match="digits:test holds 297 images but 298"):
        load("digits:test", DIGITS, labels=True, need=298)


def test_digits_are_refused_for_a_model_of_another_size() -> None:
    with pytest.raises(InputError, match="32 x 32 pixels but the model expects 224"):
        load("digits:test", Preprocessing(), labels=True)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("tfds:mnist:test", ("mnist", "test", None)),
        ("tfds:mnist:test:/data", ("mnist", "test", "/data")),
        ("tfds:set/config:train[:10%]+test[5:]:gs://bucket/x", ("set/config", "train[:10%]+test[5:]", "gs://bucket/x")),
    ],
)
def test_a_tfds_source_splits_into_name_split_and_folder(
    monkeypatch: pytest.MonkeyPatch, small: Preprocessing, text: str, parts: tuple[str, ...]
) -> None:
    seen = []
    monkeypatch.setattr(
        source, "load_tfds", lambda name, split, _, *, data_dir, **rest: seen.append((name, split, data_dir))
    )
    load(text, small, labels=False)
    assert seen == [parts]


@pytest.mark.parametrize("text", ["tfds:", "tfds:mnist", "tfds:mnist:", "tfds::test", "tfds:mnist:test[:5"])
def test_a_malformed_tfds_source_is_refused(small: Preprocessing, text: str) -> None:
    with pytest.raises(InputError, match="tfds:name:split"):
        load(text, small, labels=False)


def test_an_empty_source_does_not_read_the_working_directory(small: Preprocessing) -> None:
    with pytest.raises(InputError, match="empty"):
        load("", small, labels=False)


def test_an_unknown_source_is_reported_as_a_missing_folder(small: Preprocessing) -> None:
    with pytest.raises(InputError, match=r"tdfs:mnist:test.*does not exist"):
        load("tdfs:mnist:test", small, labels=False)
