"""Bad input to the comparison is one sentence that names the file and the key, before anything is computed."""

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from interchange_files import Arrays, change_meta, copy_set, rewrite

from cptv_jax.compare import compare_file
from cptv_jax.compare.checks import find_tolerances
from cptv_jax.errors import InputError


def refusal(path: Path) -> str:
    """The message, without the file's folder."""
    with pytest.raises(InputError) as caught:
        compare_file(path)
    message = str(caught.value)
    assert "\n" not in message
    assert path.parent.name in message  # names the file
    return message.replace(f"{path.parent}/", "")


@pytest.fixture
def quantized(golden: Path, tmp_path: Path) -> Path:
    return copy_set(golden / "small_sets/evolq_signed/result.npz", tmp_path / "a set")


@pytest.fixture
def search(golden: Path, tmp_path: Path) -> Path:
    return copy_set(golden / "evolq_search_w4a8.npz", tmp_path / "a set")


def test_files_that_are_no_archives(tmp_path: Path) -> None:
    folder = tmp_path / "files"
    folder.mkdir()
    assert refusal(folder / "missing.npz").startswith("missing.npz does not exist")
    assert refusal(folder).count("is not a file") == 1
    (folder / "text.npz").write_text("no archive")
    assert "text.npz is not a readable .npz archive" in refusal(folder / "text.npz")
    (folder / "empty.npz").write_bytes(b"")
    assert "is not a readable .npz archive" in refusal(folder / "empty.npz")
    np.save(folder / "single.npy", np.zeros(3))
    assert "single array" in refusal(folder / "single.npy")
    np.savez(folder / "bare.npz", logits=np.zeros(3))
    assert "lacks the array 'meta'" in refusal(folder / "bare.npz")


class Bomb:
    def __reduce__(self) -> Any:
        raise AssertionError("pickled")


def test_nothing_is_unpickled(tmp_path: Path) -> None:
    folder = tmp_path / "files"
    folder.mkdir()
    np.savez(folder / "objects.npz", meta=np.array("{}"), extra=np.array([{1: 2}], object))
    assert "array 'extra' cannot be read" in refusal(folder / "objects.npz")
    (folder / "pickle.npz").write_bytes(pickle.dumps({"meta": 1}))
    assert "is not a readable .npz archive" in refusal(folder / "pickle.npz")


@pytest.mark.parametrize(
    ("meta", "expected"),
    [
        (np.array("{"), "meta is not JSON"),
        (np.array("[1]"), "meta must be a JSON object"),
        (np.array(3), "array 'meta' must be a single string"),
        (np.array(json.dumps({"kind": "losses"})), "meta lacks 'format'"),
        (np.array(json.dumps({"format": 2})), "meta.format is 2; this program reads version 1"),
        (np.array(json.dumps({"format": 1, "kind": "quantised"})), "meta.kind is 'quantised'"),
        (
            np.array(json.dumps({"format": 1, "kind": "quantized", "reference": "gptq"})),
            "meta.reference is 'gptq'; supported: evol-q, fq-vit",
        ),
        (
            np.array(json.dumps({"format": 1, "kind": "search", "reference": "fq-vit"})),
            "meta.reference is 'fq-vit'; supported: evol-q",
        ),
        (np.array(json.dumps({"format": 1, "kind": ["quantized"]})), "meta.kind is ['quantized']"),
    ],
)
def test_meta_must_say_what_the_file_is(tmp_path: Path, meta: np.ndarray, expected: str) -> None:
    path = tmp_path / "file.npz"
    np.savez(path, meta=meta)
    assert expected in refusal(path)


Change = Callable[[dict[str, Any]], Any]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda meta: meta.pop("weights"), "meta lacks 'weights'"),
        (lambda meta: meta.update(weights="other.npz"), "meta.weights names 'other.npz', which does not lie beside it"),
        (lambda meta: meta.update(data="other.npz"), "meta.data names 'other.npz'"),
        (lambda meta: meta.update(data=3), "meta.data is 3"),
        (lambda meta: meta["bits"].update(weights=9), "meta.bits.weights is 9, but must be a whole number from 2 to 8"),
        (lambda meta: meta["bits"].update(softmax=float("inf")), "meta.bits.softmax is inf"),
        (lambda meta: meta["bits"].pop("activations"), "meta lacks 'bits.activations'"),
        (lambda meta: meta.update(bits=8), "meta lacks 'bits.weights'"),
        (lambda meta: meta.update(ptf=1), "meta.ptf is 1, but must be true or false"),
        (lambda meta: meta.pop("quantize_input"), "meta lacks 'quantize_input'"),
        (lambda meta: meta["observer"].update(weights="percentile"), "meta.observer.weights is 'percentile'"),
        (lambda meta: meta["observer"].update(activations="mse"), "meta.observer.activations is 'mse'"),
        (lambda meta: meta["calibration"].update(images=[4, 97]), "meta.calibration.images ends at 97, but"),
        (lambda meta: meta["calibration"].update(images=[4, 4]), "meta.calibration.images is [4, 4]"),
        (lambda meta: meta["calibration"].update(images=None), "meta.calibration.images is None"),
        (lambda meta: meta["calibration"].update(batch=0), "meta.calibration.batch is 0"),
        (lambda meta: meta["calibration"].update(score_batch="all"), "meta.calibration.score_batch is 'all'"),
        (lambda meta: meta["model"].update(gelu="tanh"), "meta.model.gelu is 'tanh'"),
        (lambda meta: meta["model"].update(family="swin"), "meta.model.family is 'swin'"),
        (lambda meta: meta["model"].update(num_heads=5), "embed_dim 24 does not divide by 5 heads"),
        (lambda meta: meta["model"].update(patch_size=5), "img_size 16 does not divide by patch_size 5"),
        (lambda meta: meta["model"].update(depth=10**9), "meta.model.depth is 1000000000"),
        (lambda meta: meta["model"].update(depth=3), "model.npz lacks 'blocks.2.norm1.weight'"),
        (lambda meta: meta["model"].update(qkv_bias=True), "model.npz lacks 'blocks.0.attn.qkv.bias'"),
        (lambda meta: meta["model"].update(embed_dim=48), "has shape (1, 1, 24)"),
        # The recipe then has a quantizer that the file lacks.
        (lambda meta: meta.update(quantize_input=True), "lacks the array 'param/qact_input/scale'"),
    ],
)  # fmt: skip
def test_meta_must_fit_the_set(quantized: Path, change: Change, expected: str) -> None:
    assert expected in refusal(change_meta(quantized, change))


@pytest.mark.parametrize("name", ["model.npz", "data.npz"])
def test_weights_and_data_must_lie_beside_the_file(quantized: Path, name: str) -> None:
    (quantized.parent / name).unlink()
    assert f"names '{name}', which does not lie beside it" in refusal(quantized)


@pytest.mark.parametrize(
    "key", ["fp_logits", "q_logits", "q_top1", "block_in/0", "param/qact1/zero_point", "qweight/head"]
)
def test_missing_arrays(quantized: Path, key: str) -> None:
    assert f"lacks the array '{key}'" in refusal(rewrite(quantized, lambda arrays: arrays.pop(key)))


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("test_labels", np.zeros(59, np.int32), "'test_labels' has shape (59,), but must have (60)"),
        ("test_labels", np.zeros(60, np.float32), "'test_labels' must hold whole numbers"),
        ("test_images", np.zeros((60, 3, 16, 16), np.float32), "'test_images' has shape (60, 3, 16, 16)"),
        ("calib_images", np.zeros((96, 16, 16, 1), np.float32), "'calib_images' has shape (96, 16, 16, 1)"),
        ("calib_images", np.full((96, 1, 16, 16), "a"), "but must hold numbers"),
    ],
)
def test_data_of_other_shapes(quantized: Path, key: str, value: np.ndarray, expected: str) -> None:
    rewrite(quantized.parent / "data.npz", lambda arrays: arrays.update({key: value}))
    assert expected in refusal(quantized)


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("q_logits", np.zeros((297, 9), np.float32), "'q_logits' has shape (297, 9), but must have (297, 10)"),
        ("param/act_out/scale", np.ones(3, np.float32), "'param/act_out/scale' has 3 values (3,), but needs 1"),
        ("qweight/head", np.zeros((64, 10), np.float32), "'qweight/head' has shape (64, 10), but must have (10, 64)"),
        ("block_out/0", np.zeros((8, 16, 64), np.float32), "'block_out/0' has shape (8, 16, 64)"),
        ("block_out/3", np.zeros((8, 17, 64), np.float32), "holds a block that a model of depth 3 lacks"),
        ("param/extra/scale", np.ones(1, np.float32), "'param/extra/scale' belongs to no quantizer"),
        ("q_top1", np.ones(2, np.float32), "'q_top1' has shape (2,), but must be a single number"),
    ],
)
def test_arrays_of_other_shapes(golden: Path, tmp_path: Path, key: str, value: np.ndarray, expected: str) -> None:
    path = copy_set(golden / "evolq_fq_w4a8.npz", tmp_path / "a set")
    assert expected in refusal(rewrite(path, lambda arrays: arrays.update({key: value})))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda arrays: arrays.pop("o_fps"), "lacks the array 'o_fps'"),
        (lambda arrays: [arrays.pop(key) for key in list(arrays) if key.startswith("evo/0/")], "under 'evo/0/'"),
    ],
)
def test_searches_must_be_complete(search: Path, change: Callable[[Arrays], Any], expected: str) -> None:
    assert expected in refusal(rewrite(search, change))


def test_losses_need_pairs(golden: Path, tmp_path: Path) -> None:
    path = copy_set(golden / "evolq_losses.npz", tmp_path / "a set")
    rewrite(path, lambda arrays: arrays.pop("B32/pair1/k"))
    assert "lacks the array 'B32/pair1/k'" in refusal(path)
    rewrite(path, lambda arrays: [arrays.pop(key) for key in list(arrays) if key != "meta"])
    assert "holds no pairs" in refusal(path)


def test_tolerances_come_from_a_files_own_noise_floor_or_the_worst_of_its_reference() -> None:
    unseen = find_tolerances("evol-q", "evolq_fq_w4a8", "other weights")
    assert (unseen.block_off, unseen.logits_mean) == pytest.approx((3 * 0.048, 3 * 0.0069))
    assert [unseen.predictions_of(images) for images in (297, 60, 1000)] == [2, 1, 7]
    assert unseen.top1_points_of(297) == 0.7
    assert unseen.top1_points_of(60) == pytest.approx(100 / 60)
    assert find_tolerances("fq-vit", "anything", "").predictions_of(297) == 4
