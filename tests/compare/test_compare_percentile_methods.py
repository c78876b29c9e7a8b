"""Recordings of RepQ-ViT and ERQ: every step can fail, and bad input is refused with the file and the key."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from interchange_files import Arrays, change_meta, copy_set, read, rewrite
from test_compare_golden import failures
from test_compare_input import refusal

from cptv_jax.compare import compare_file, repq_vit

slow = pytest.mark.slow


def drop(arrays: Arrays, prefix: str) -> None:
    for key in [key for key in arrays if key.startswith(prefix)]:
        arrays.pop(key)


FIRST, FORCED = repq_vit.FIRST_PASS, repq_vit.TEACHER_FORCED


@pytest.mark.slow
def test_each_step_of_a_repq_vit_file_can_fail(golden: Path, tmp_path: Path) -> None:
    def change(arrays: Arrays) -> None:
        arrays["fp_logits"][3, 2] += 1e-3
        arrays["initparam/blocks.1.attn.qkv.input_quantizer/delta"] *= 1.01
        arrays["reparam/blocks.2.mlp.fc1/weight"][:2] += 1e-3
        arrays["param/blocks.1.mlp.fc1.weight_quantizer/zero_point"] += 1
        arrays["qweight/blocks.0.attn.qkv"][:4] *= 1.05
        arrays["block_out/2"][:, 0] += np.float32(0.01)
        arrays["reparam_fp_logits"][0, 0] += 1e-3
        arrays["q_logits"] = np.roll(arrays["q_logits"], 1, -1)
        arrays["q_top1"] = arrays["q_top1"] - np.float32(5)

    path = rewrite(copy_set(golden / "repq_w4a4.npz", tmp_path), change)
    assert failures(path) == {
        ("float model", "fp_logits"),
        (FORCED, "all"),
        (repq_vit.REWRITTEN, "all"),
        ("1 quantizer parameters", "all"),
        ("2 dequantized weights", "all"),
        ("3 blocks alone, on the recorded input", "block_out/2"),
        (repq_vit.REWRITTEN_LOGITS, "reparam_fp_logits"),
        ("4 quantized logits", "mean difference"),
        ("4 quantized logits", "predictions that differ"),
        ("4 quantized logits", "top-1"),
    }


def test_without_recorded_block_inputs_the_first_pass_itself_is_judged(golden: Path, tmp_path: Path) -> None:
    def change(arrays: Arrays) -> None:
        drop(arrays, "calib_block_in/")
        arrays["initparam/head.input_quantizer/delta"] *= 1.01
        arrays["initparam/blocks.1.attn.qkv.input_quantizer/delta"] *= 1.01

    path = rewrite(copy_set(golden / "repq_w4a4.npz", tmp_path), change)
    # A flipped code of ours, with nothing to tell it from, also reaches the reparameterized layers.
    assert failures(path) - {("2 reparameterized layers", "all")} == {(FIRST, "all")}


@slow
def test_a_flip_that_spread_is_told_from_a_wrong_first_pass(golden: Path, tmp_path: Path) -> None:
    """Recorded inputs of block 1 that another run would have: only the blocks on their recorded inputs are judged."""

    def change(arrays: Arrays) -> None:
        arrays["calib_block_in/1"] = arrays["calib_block_in/1"] * np.float32(1.05)

    path = rewrite(copy_set(golden / "repq_w4a4.npz", tmp_path), change)
    comparison = compare_file(path)
    verdicts = {check.group: check for check in comparison.checks if check.name == "all"}
    assert not verdicts[FORCED].passed  # what is recorded does not belong to these inputs
    assert verdicts[FIRST].passed and verdicts[FIRST].allowed is not None  # the free run does, and goes on
    assert verdicts["2 dequantized weights"].passed


@slow
def test_each_step_of_an_erq_file_can_fail(golden: Path, tmp_path: Path) -> None:
    from cptv_jax.compare import erq

    def change(arrays: Arrays) -> None:
        arrays["initparam/blocks.1.attn.matmul2.quantizer_A/delta"] *= 1.01
        arrays["reparam/blocks.0.norm1/bias"][:2] += 1e-2
        arrays["reparam/blocks.1.mlp.fc1/weight"] += 1e-2
        arrays["reparamparam/blocks.0.attn.qkv.input_quantizer/zero_point"] += np.float32(0.01)
        arrays["after_Aqer/blocks.2.mlp.fc2/weight"][:] += 1e-3
        arrays["after_Wqer/blocks.2.mlp.fc2/weight"][:] += 1e-3
        indices = arrays["param/blocks.0.mlp.fc1.weight_quantizer/unique_top_indices"]
        indices[0] = next(i for i in range(64) if i not in indices)
        arrays["param/blocks.1.mlp.fc1.weight_quantizer/delta_2"] *= 1.01
        arrays["qweight/head"][:] *= 1.05

    path = rewrite(copy_set(golden / "erq_w4a4.npz", tmp_path), change)
    assert failures(path) == {
        (erq.FIRST_PASS, "all"),
        (erq.REWRITTEN, "all"),
        (erq.SECOND_PASS, "all"),
        (erq.CORRECTED, "all"),
        (erq.ROUNDED, "all"),
        (erq.OUTLIERS, "param/blocks.0.mlp.fc1.weight_quantizer/unique_top_indices"),
        ("1 quantizer parameters", "all"),
        ("2 dequantized weights", "all"),
    }


@slow
@pytest.mark.parametrize("name", ["repq_w4a4", "erq_w4a4"])
def test_every_recorded_parameter_and_rewritten_layer_has_a_row(golden: Path, name: str) -> None:
    rows = {check.name for check in compare_file(golden / f"{name}.npz").checks}
    wanted = ("param/", "initparam/", "reparamparam/", "reparam/", "after_", "qweight/", "block_out/")
    skipped = ("/n_bits", "/unique_nottop_indices")
    assert {key for key in read(golden / f"{name}.npz") if key.startswith(wanted) and not key.endswith(skipped)} <= rows


@pytest.mark.parametrize(
    ("name", "change", "expected"),
    [
        ("repq_w4a4", lambda meta: meta["bits"].pop("patch_input"), "meta lacks 'bits.patch_input'"),
        ("repq_w4a4", lambda meta: meta["bits"].update(weights=1), "meta.bits.weights is 1"),
        ("erq_w4a4", lambda meta: meta.pop("coe"), "meta lacks 'coe'"),
        ("erq_w4a4", lambda meta: meta.update(coe=0), "meta.coe is 0, but must be a positive number"),
        ("erq_w4a4", lambda meta: meta.update(variant="icml"), "meta.variant is 'icml'; supported: expanded"),
        (
            "erq_w4a4",
            lambda meta: meta["calibration"].update(activation_init=[0, 97]),
            "meta.calibration.activation_init ends at 97",
        ),
        (
            "erq_w4a4",
            lambda meta: meta["calibration"].update(images=[8, 96]),
            "meta.calibration.activation_init begins before calibration.images",
        ),
    ],
)
def test_meta_must_describe_the_run(
    golden: Path, tmp_path: Path, name: str, change: Callable[[dict[str, Any]], Any], expected: str
) -> None:
    path = copy_set(golden / f"{name}.npz", tmp_path / "a set")
    assert expected in refusal(change_meta(path, change))


@pytest.mark.parametrize(
    ("name", "change", "expected"),
    [
        ("repq_w4a4", lambda a: a.pop("q_top1"), "lacks the array 'q_top1'"),
        ("repq_w4a4", lambda a: a.pop("initparam/head.input_quantizer/zero_point"), "lacks the array 'initparam/head."),
        ("repq_w4a4", lambda a: a.pop("reparam_fp_logits"), "lacks the array 'reparam_fp_logits'"),
        ("repq_w4a4", lambda a: a.update({"calib_block_in/7": a["block_in/0"]}), "'calib_block_in/' holds a block"),
        ("repq_w4a4", lambda a: a.update({"calib_block_in/0": a["block_in/0"]}), "'calib_block_in/0' has shape (8,"),
        (
            "erq_w4a4",
            lambda a: a.update({"initparam/norm.input_quantizer/delta": np.float32(1)}),
            "'initparam/norm.input_quantizer/delta' belongs to no quantizer",
        ),
        (
            "erq_w4a4",
            lambda a: a.update({"reparam/blocks.7.norm1/weight": np.ones(64, np.float32)}),
            "'reparam/blocks.7.norm1/weight' belongs to no layer",
        ),
        ("erq_w4a4", lambda a: drop(a, "after_Wqer/"), "lacks arrays under 'after_Wqer/'"),
    ],
)
def test_arrays_must_belong_to_the_run(
    golden: Path, tmp_path: Path, name: str, change: Callable[[Arrays], Any], expected: str
) -> None:
    path = copy_set(golden / f"{name}.npz", tmp_path / "a set")
    assert expected in refusal(rewrite(path, change))
