"""Accuracy, against NumPy."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cptv_jax import Images, InputError, Output, Stage, evaluate, images_from_arrays
from cptv_jax import evaluation as module
from cptv_jax.evaluation import check_labels, check_unseen, logits_of
from cptv_jax.runtime.forward import compute_outputs

CLASSES = 7


@dataclass(frozen=True)
class FirstPixels:
    """The first CLASSES values of an image are its logits."""

    def __call__(self, state: object, x: Any) -> Output:
        flat = jnp.reshape(x, (x.shape[0], -1))
        return Output(features=flat, logits=flat[:, :CLASSES])


STAGES = (Stage("all", FirstPixels(), {}),)


def images_of(logits: np.ndarray, labels: object) -> Images:
    pixels = np.zeros((len(logits), 4, 4, 1), np.float32)
    pixels.reshape(len(logits), -1)[:, :CLASSES] = logits
    return images_from_arrays(pixels, labels)


def oracle(logits: np.ndarray, labels: np.ndarray) -> tuple[float, float]:
    """Percent of images whose label has fewer than 1 (5) classes before it; a lower class wins a tie."""
    first = fifth = 0
    for row, label in zip(logits, labels, strict=True):
        before = sum(v > row[label] or (v == row[label] and c < label) for c, v in enumerate(row))
        first += before < 1
        fifth += before < 5
    return 100 * first / len(labels), 100 * fifth / len(labels)


@pytest.mark.parametrize("count", [1, 9, 10, 11, 37, 100])
def test_accuracy_is_the_oracles_also_with_a_ragged_last_chunk(count: int) -> None:
    rng = np.random.default_rng(count)
    logits = rng.standard_normal((count, CLASSES)).astype(np.float32)
    labels = rng.integers(0, CLASSES, count)
    found = evaluate(STAGES, images_of(logits, labels))
    assert (found.top1, found.top5) == pytest.approx(oracle(logits, labels), abs=1e-12)
    assert found.images == count


def test_of_equal_logits_the_lower_class_counts_first() -> None:
    rng = np.random.default_rng(0)
    logits = rng.integers(0, 3, (60, CLASSES)).astype(np.float32)
    labels = rng.integers(0, CLASSES, 60)
    found = evaluate(STAGES, images_of(logits, labels))
    assert (found.top1, found.top5) == pytest.approx(oracle(logits, labels), abs=1e-12)
    constant = evaluate(STAGES, images_of(np.zeros((7, CLASSES)), np.arange(7)))
    assert constant.top1 == pytest.approx(100 / 7)  # class 0 alone, not every class
    assert constant.top5 == pytest.approx(500 / 7)


def test_every_image_has_its_own_logits_in_order() -> None:
    logits = np.arange(23 * CLASSES, dtype=np.float32).reshape(23, CLASSES)
    images = images_of(logits, None)
    np.testing.assert_array_equal(logits_of(STAGES, images), logits)
    devices = jax.device_count()  # more than one where the command line was run in this process before
    for budget in (1.0, 4000.0, None):  # one image at once on each device, a few, and what the device takes
        done: list[int] = []
        found = compute_outputs(STAGES, images.normalize, 23, budget=budget, on_progress=done.append)
        np.testing.assert_array_equal(found.logits, logits)
        assert sum(done) == 23
        if budget == 1.0:
            assert done == [min(devices, 23 - start) for start in range(0, 23, devices)]


def test_labels_are_checked_before_the_model_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "logits_of", lambda *args: pytest.fail("the model ran"))
    logits = np.zeros((3, CLASSES))
    with pytest.raises(InputError, match="label 7, but the model knows classes 0 to 6; give the images"):
        evaluate(STAGES, images_of(logits, [0, 7, 1]))
    with pytest.raises(InputError, match="these 3 images have no labels"):
        evaluate(STAGES, images_of(logits, None))
    check_labels(STAGES, images_of(logits, [0, 6, 1]))


def test_an_accuracy_reads_well() -> None:
    accuracy = evaluate(STAGES, images_of(np.eye(3, CLASSES), [0, 1, 6]))
    assert str(accuracy) == "top-1 66.67 %, top-5 66.67 % on 3 images"


def test_evaluation_images_that_were_calibrated_on_are_named() -> None:
    pixels = np.random.default_rng(0).standard_normal((6, 4, 4, 1)).astype(np.float32)
    calibration = images_from_arrays(pixels[:3])
    check_unseen(images_from_arrays(pixels[3:]), calibration)
    check_unseen(images_from_arrays(np.nextafter(pixels[:3], 9)), calibration)  # other pixels are other images
    with pytest.raises(InputError, match=r"^2 of the 4 evaluation .* \(the first is image 1\); evaluate on others"):
        check_unseen(images_from_arrays(pixels[[5, 2, 4, 0]]), calibration)
