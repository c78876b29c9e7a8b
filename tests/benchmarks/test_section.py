"""RESULTS.md says what was measured."""

import copy
from typing import Any

from benchmarks import section

_PASS: dict[str, Any] = {
    "candidates": 2,
    "images_candidates_per_second": 100.0,
    "gflops": 50.0,
    "refresh": 1.0,
    "stages": {"blocks.1": 1.0, "blocks.0": 3.0},
}
_OURS: dict[str, Any] = {
    "model": "deit_tiny_patch16_224",
    "arithmetic": "int8",
    "images": 100,
    "float": 40.0,
    "quantized": 60.0,
    "passes": [_PASS],
    "peak_gflops": {"float32": 200.0, "int8": 400.0},
    "gigaflops_of_one_image": 2.0,
    "peak_memory_mib": 1024.0,
}
_RACE = {**_OURS, "images": 400, "batches": 4, "passes": [{**_PASS, "images_candidates_per_second": 300.0}]}
_LOOP: dict[str, Any] = {
    "default": {"torch": "2.13.0", "float": {"10": 30.0, "50": 20.0}, "candidate": {"10": 10.0, "50": 12.0}},
    "tuned": {"torch": "2.13.0", "float": {"10": 50.0, "50": 40.0}, "candidate": {"10": 20.0, "50": 15.0}},
}
_MEASURED: dict[str, Any] = {
    "date": "2026-01-01",
    "command": "python -m benchmarks.run",
    "load_before": 0.0,
    "load_after": 0.0,
    "machine": {"cpu": "c", "cores": 2, "memory_gib": 8.0, "python": "3", "jax": "1", "jaxlib": "2", "flax": "3"},
    "compare": {"ours": {"int8": [_OURS]}, "race": _RACE, "theirs": {"loop": [_LOOP]}, "export": {}},
}


def test_each_allocator_is_compared_at_its_own_best_batch_size() -> None:
    text = section.render(_MEASURED)
    assert "| PyTorch, loop, default allocator: candidate | 12.0 | 50 |" in text
    assert "| PyTorch, loop, tuned allocator: candidate | 20.0 | 10 |" in text
    assert "| loop, default | 8.3 | 25.0 | 5.0 |" in text
    assert "| loop, tuned | 5.0 | 15.0 | 3.0 |" in text


def test_medians_are_over_rounds_and_over_sizes_that_every_round_has() -> None:
    rounds = [copy.deepcopy(_LOOP) for _ in range(3)]
    for one, rate in zip(rounds, (10.0, 90.0, 30.0), strict=True):
        one["tuned"]["candidate"]["10"] = rate
    del rounds[2]["tuned"]["candidate"]["50"]
    measured = copy.deepcopy(_MEASURED)
    measured["compare"]["theirs"]["loop"] = rounds
    assert "| PyTorch, loop, tuned allocator: candidate | 30.0 | 10 |" in section.render(measured)


def test_later_rounds_try_every_size_that_was_best_somewhere() -> None:
    assert section.best_batches(_LOOP) == [10, 50]


def test_the_schedule_is_projected_from_evaluations_and_cache() -> None:
    # Both blocks: 4 s for 2 candidates x 100 images, so 0.02 s an image and candidate; the cache takes 0.01 s an image.
    seconds = 10 * 1000 * (4 * 0.02 + 0.01)
    text = section.render(_MEASURED)
    assert f"cptv_jax {seconds / 60:.1f} min" in text
    assert f"PyTorch's fastest {10 * 4 * 2 * 1000 / 20 / 60:.1f} min" in text


def test_throughput_is_held_against_the_fastest_type_of_operand() -> None:
    assert "| 50 | 12 % of 400 (int8) | 60.00 (30 %) |" in section.render(_MEASURED)
