import re
import time
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cptv_jax.data import decoding, load_folder, preprocess
from cptv_jax.data.folder import list_folder
from cptv_jax.data.images import Images
from cptv_jax.errors import InputError
from cptv_jax.models.preprocessing import Preprocessing


def load(root: Path, small: Preprocessing, **options: Any) -> Images:
    return load_folder(root, small, **{"labels": True, "progress": False, **options})


def test_class_index_folders_give_their_integer_as_label_padded_or_not(
    tmp_path: Path, paint: Callable[..., Path], small: Preprocessing
) -> None:
    for folder, value in [("0007", 70), ("12", 120), ("3", 30)]:
        paint(tmp_path / folder / "a.png", value)
    images = load(tmp_path, small)
    assert dict(zip(images.require_labels().tolist(), images.pixels[:, 0, 0, 0].tolist(), strict=True)) == {
        7: 70,
        12: 120,
        3: 30,
    }
    assert images.pixels.shape == (3, 16, 16, 3)
    assert images.require_labels().dtype == np.int32
    assert (images.mean, images.std) == (small.mean, small.std)


def test_wordnet_folders_are_labelled_by_sorted_order_empty_ones_included(
    tmp_path: Path, paint: Callable[..., Path], small: Preprocessing, caplog: pytest.LogCaptureFixture
) -> None:
    paint(tmp_path / "n00000009" / "b.png", 90)
    paint(tmp_path / "n00000001" / "c.png", 10)
    (tmp_path / "n00000005").mkdir()
    images = load(tmp_path, small)
    assert images.require_labels().tolist() == [0, 2]
    assert images.pixels[:, 0, 0, 0].tolist() == [10, 90]
    load(tmp_path, small, labels=False)
    assert len(caplog.records) == 1
    assert "3 WordNet-id folders" in caplog.text  # not ImageNet's 1000: the labels may not be the model's


def test_flat_and_freely_named_folders_load_without_labels_only(
    tmp_path: Path, paint: Callable[..., Path], small: Preprocessing
) -> None:
    paint(tmp_path / "flat" / "a.png")
    paint(tmp_path / "named" / "cat" / "a.png")
    for root in (tmp_path / "flat", tmp_path / "named"):
        assert load(root, small, labels=False).labels is None
        with pytest.raises(InputError, match=re.escape(str(root)) + ".*class index"):
            load(root, small)


def test_labels_are_left_out_when_not_asked_for(
    tmp_path: Path, paint: Callable[..., Path], small: Preprocessing
) -> None:
    paint(tmp_path / "5" / "a.png")
    assert load(tmp_path, small, labels=False).labels is None


def test_a_limit_draws_by_seed_keeps_labels_matched_and_smaller_limits_are_prefixes(
    tmp_path: Path, paint: Callable[..., Path], small: Preprocessing
) -> None:
    for label in range(20):
        paint(tmp_path / str(label) / "a.png", 10 * label)
    first = load(tmp_path, small, limit=12, seed=1)
    np.testing.assert_array_equal(first.pixels[:, 0, 0, 0], 10 * first.require_labels())
    assert len(set(first.names)) == 12
    assert load(tmp_path, small, limit=12, seed=1).names == first.names
    assert load(tmp_path, small, limit=5, seed=1).names == first.names[:5]
    assert load(tmp_path, small, limit=12, seed=2).names != first.names
    everything = load(tmp_path, small)
    assert everything.names == tuple(sorted(everything.names))
    assert len(load(tmp_path, small, limit=99)) == 20


def test_known_extensions_in_any_case_load_and_other_or_hidden_entries_do_not(
    tmp_path: Path, paint: Callable[..., Path], small: Preprocessing
) -> None:
    names = ["a.jpg", "b.JPEG", "c.Png", "d.webp", "e.BMP"]
    for name in names:
        paint(tmp_path / name)
    paint(tmp_path / ".hidden.png")
    paint(tmp_path / ".thumbnails" / "t.png")
    (tmp_path / "readme.txt").write_text("not an image")
    assert [name.rsplit("/", 1)[1] for name in load(tmp_path, small, labels=False).names] == names


@pytest.mark.parametrize("loop", ["3", "1/up"])
def test_links_are_followed_but_loops_and_broken_links_are_not(
    tmp_path: Path, paint: Callable[..., Path], small: Preprocessing, loop: str
) -> None:
    root = tmp_path / "root"
    paint(root / "1" / "images" / "a.png")
    paint(tmp_path / "elsewhere" / "b.png")
    (root / "2").symlink_to(tmp_path / "elsewhere")
    (root / loop).symlink_to(root)
    (root / "1" / "self.png").symlink_to(root / "1" / "self.png")
    (root / "1" / "gone.png").symlink_to(root / "nowhere.png")
    assert load(root, small).require_labels().tolist() == [1, 2]


def test_pixels_are_those_of_preprocess(tmp_path: Path, paint: Callable[..., Path], small: Preprocessing) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "a.png")
    images = load(tmp_path, small, labels=False)
    np.testing.assert_array_equal(images.pixels[0], preprocess(Image.fromarray(noise), small))


@pytest.mark.parametrize("content", [b"", b"not an image", None])
@pytest.mark.parametrize("suffix", [".jpg", ".png"])
def test_an_unreadable_image_is_named(
    tmp_path: Path, paint: Callable[..., Path], small: Preprocessing, content: bytes | None, suffix: str
) -> None:
    for i in range(4):
        paint(tmp_path / f"{i}{suffix}", size=(100, 100))
    bad = tmp_path / f"2{suffix}"
    bad.write_bytes(bad.read_bytes()[:-60] if content is None else content)
    with pytest.raises(InputError, match=re.escape(str(bad)) + ".*replace or remove") as raised:
        load(tmp_path, small, labels=False)
    assert "\n" not in str(raised.value)


def test_a_missing_path_a_file_and_an_empty_folder_are_told_apart(
    tmp_path: Path, paint: Callable[..., Path], small: Preprocessing
) -> None:
    empty = tmp_path / "empty"
    (empty / "0").mkdir(parents=True)
    file = paint(tmp_path / "a.png")
    for root, said in [(tmp_path / "nowhere", "does not exist"), (file, "is a file"), (empty, "holds no images")]:
        with pytest.raises(InputError, match=re.escape(str(root)) + " " + said):
            load(root, small)


@pytest.mark.parametrize("pair", [("n00000001/a.png", "7/a.png"), ("7/a.png", "cat/a.png"), ("7/a.png", "a.png")])
def test_mixed_kinds_of_entries_are_refused(
    tmp_path: Path, paint: Callable[..., Path], small: Preprocessing, pair: tuple[str, str]
) -> None:
    for name in pair:
        paint(tmp_path / name)
    with pytest.raises(InputError, match="mixes"):
        load(tmp_path, small)


def test_a_folder_without_images_beside_the_classes_is_harmless(
    tmp_path: Path, paint: Callable[..., Path], small: Preprocessing
) -> None:
    paint(tmp_path / "7" / "a.png")
    (tmp_path / "docs").mkdir()
    assert load(tmp_path, small).require_labels().tolist() == [7]


def test_too_few_images_and_impossible_limits_are_refused(
    tmp_path: Path, paint: Callable[..., Path], small: Preprocessing
) -> None:
    for i in range(3):
        paint(tmp_path / f"{i}.png")
    assert len(load(tmp_path, small, labels=False, need=3)) == 3
    for options, said in [
        ({"need": 4}, "3 images but 4"),
        ({"need": 3, "limit": 2}, "limit is 2"),
        ({"limit": 0}, "limit is 0"),
    ]:
        with pytest.raises(InputError, match=said):
            load(tmp_path, small, labels=False, **options)


@pytest.mark.parametrize("raised", [KeyboardInterrupt, None])
def test_an_interrupt_or_a_damaged_image_opens_no_further_image(
    small: Preprocessing, monkeypatch: pytest.MonkeyPatch, raised: type[BaseException] | None
) -> None:
    opened = []

    def open_file(index: int) -> BytesIO:
        opened.append(index)
        if raised is None and index == 3:
            return BytesIO(b"damaged")
        time.sleep(0.02)
        content = BytesIO()
        Image.new("RGB", (16, 16)).save(content, "PNG")
        return content

    def interrupted(done: Any, **settings: Any) -> Any:
        for index, item in enumerate(done):
            if index == 3 and raised is not None:
                raise raised  # as Ctrl-C does in the main thread, wherever that is
            yield item

    monkeypatch.setattr(decoding, "tqdm", interrupted)
    with pytest.raises(raised or InputError):
        decoding.decode_all([str(i) for i in range(300)], open_file, small, progress=False)
    assert len(opened) < 30  # of 300: those done, and those under way in two threads


def test_progress_is_shown_on_stderr_only_when_asked(
    tmp_path: Path, paint: Callable[..., Path], small: Preprocessing, capsys: pytest.CaptureFixture[str]
) -> None:
    paint(tmp_path / "a.png")
    load(tmp_path, small, labels=False)
    assert capsys.readouterr() == ("", "")
    load(tmp_path, small, labels=False, progress=True)
    shown = capsys.readouterr()
    assert "1/1" in shown.err
    assert shown.out == ""


def test_the_calibration_photographs_are_found_in_imagenet_order(shared: Path) -> None:
    folder = shared / "data" / "imagenet-sample"
    if not folder.is_dir():
        pytest.skip(f"{folder} is absent")
    listing = list_folder(folder)
    assert listing.labels == list(range(1000))
    assert listing.files[0].parent.name == "n01440764"  # tench, ImageNet's class 0
    assert not listing.remark
