"""Files recorded from published code pass; a file that tells another story fails, at every step."""

from pathlib import Path

import numpy as np
import pytest
from interchange_files import Arrays, copy_set, read, rewrite

from cptv_jax.compare import compare_file, render, run

slow = pytest.mark.slow


@pytest.mark.parametrize(
    "name",
    [
        "evolq_losses",
        "evolq_fq_w4a8",
        pytest.param("small_sets/evolq_signed/result", marks=slow),
        pytest.param("small_sets/fqvit_log3/result", marks=slow),
        pytest.param("evolq_fq_w8a8", marks=slow),
        pytest.param("evolq_cfg_w4a8", marks=slow),
        pytest.param("fqvit_w8a8_attn4", marks=slow),
        pytest.param("evolq_search_w4a8", marks=slow),
        pytest.param("repq_w4a4", marks=slow),
        pytest.param("erq_w4a4", marks=slow),
    ],
)
def test_files_recorded_from_published_code_pass(golden: Path, name: str) -> None:
    comparison = compare_file(golden / f"{name}.npz")
    report = render(comparison)
    assert comparison.passed, report
    assert report.splitlines()[-1].startswith("PASS")


def failures(path: Path) -> set[tuple[str, str]]:
    """Group and name of every check beyond tolerance."""
    comparison = compare_file(path)
    report = render(comparison)
    found = {(check.group, check.name) for check in comparison.checks if not check.passed}
    assert comparison.passed == (not found)
    assert report.splitlines()[-1].startswith("FAIL" if found else "PASS")
    assert report.count("BEYOND TOLERANCE") == len(found)
    return found


def test_each_step_of_a_quantized_file_can_fail(golden: Path, tmp_path: Path) -> None:
    def change(arrays: Arrays) -> None:
        arrays["fp_logits"][3, 2] += 1e-3
        arrays["param/blocks.1.qact2/scale"] *= 1.01  # one scale for each of 64 channels
        arrays["qweight/blocks.0.attn.qkv"][:4] *= 1.05
        # The last block's output is no block's input.
        last = max(int(key.split("/")[1]) for key in arrays if key.startswith("block_out/"))
        arrays[f"block_out/{last}"] = arrays[f"block_out/{last}"].copy() * 1.1
        arrays["q_logits"] = np.roll(arrays["q_logits"], 1, -1)
        arrays["q_top1"] = arrays["q_top1"] - np.float32(5)
        arrays["dequant_state_logits"] = arrays["dequant_state_logits"] + np.float32(0.1)

    path = rewrite(copy_set(golden / "evolq_fq_w4a8.npz", tmp_path), change)
    off = "4 logits with quantizers off, integer functions on"
    assert failures(path) == {
        ("float model", "fp_logits"),
        ("1 quantizer parameters", "all"),
        ("2 dequantized weights", "all"),
        ("3 blocks alone, on the recorded input", "block_out/2"),
        ("4 quantized logits", "mean difference"),
        ("4 quantized logits", "predictions that differ"),
        ("4 quantized logits", "top-1"),
        (off, "mean difference"),
    }


def test_values_that_are_not_numbers_fail(golden: Path, tmp_path: Path) -> None:
    def change(arrays: Arrays) -> None:
        arrays["fp_logits"][0, 0] = np.nan
        arrays["block_out/2"][:] = np.nan
        arrays["q_logits"][5] = np.nan
        arrays["qweight/head"][:] = np.nan

    path = rewrite(copy_set(golden / "evolq_fq_w4a8.npz", tmp_path), change)
    assert {group for group, _ in failures(path)} == {
        "float model", "2 dequantized weights", "3 blocks alone, on the recorded input", "4 quantized logits"
    }  # fmt: skip


def test_a_few_deviating_values_pass_and_are_listed(golden: Path, tmp_path: Path) -> None:
    def change(arrays: Arrays) -> None:
        arrays["param/act_out/scale"] = arrays["param/act_out/scale"] * 1.01

    path = rewrite(copy_set(golden / "evolq_fq_w4a8.npz", tmp_path), change)
    comparison = compare_file(path)
    [row] = [check for check in comparison.checks if check.name == "param/act_out/scale"]
    assert row.remark == "1 of 1 off"
    assert row.largest == pytest.approx(0.01, rel=0.01)
    assert "param/act_out/scale" in render(comparison)


@slow
def test_each_step_of_a_search_can_fail(golden: Path, tmp_path: Path) -> None:
    def change(arrays: Arrays) -> None:
        arrays["o_fps"] += np.float32(0.1)
        arrays["cand/last/losses"][4] += 1e-3
        arrays["cand/first/loss_base"] = arrays["cand/first/loss_base"] - 1e-3
        # Before the third cycle member 0 is better than its 14 equals; the recorded draw passed it over.
        assert 0 not in arrays["evo/0/samples"][2]
        arrays["evo/0/samples"][2, 0] = 0
        arrays["evo/1/pop_scales_before_cycle"][2, [0, 1]] = arrays["evo/1/pop_scales_before_cycle"][2, [1, 0]]
        arrays["evo/1/pop_losses_before_cycle"][1, 7] += 1e-3
        arrays["evo/1/final_loss"] = arrays["evo/1/final_loss"] - 1e-3
        arrays["evo/1/final_scales"][9] += 1e-3
        arrays["evo/1/test_logits_after"] += np.float32(0.1)
        arrays["final_param/blocks.0.attn.proj/scale"] *= 2

    path = rewrite(copy_set(golden / "evolq_search_w4a8.npz", tmp_path), change)
    found = failures(path)
    assert found == {
        ("teacher and start", "o_fps"),
        ("cand/last", "candidate 4"),
        ("cand/first", "loss_base"),
        ("evo/0", "cycle 2: parent"),
        ("evo/1", "cycle 2: survivors"),
        ("evo/1", "cycle 1: ranking"),
        ("evo/1", "final loss"),
        ("evo/1", "final_scales"),
        ("evo/1: logits afterwards", "mean difference"),
        ("1 quantizer parameters", "all"),
    }


def test_each_loss_can_fail_and_the_exit_code_says_so(golden: Path, tmp_path: Path) -> None:
    names = ("contrastive_T1", "contrastive_T3", "mse", "kl_dim1_batchmean", "cosine_sum_dim1")

    def change(arrays: Arrays) -> None:
        for pair, name in enumerate(names):
            key = f"B32/pair{pair}/{name}"
            arrays[key] = np.asarray(arrays[key] * 1.001, np.float32)
        arrays["B32/pair0/kl_dim0_batchmean"] = np.asarray(7, np.float32)  # artefacts: not compared
        arrays["B32/pair0/cosine_argmax_dim0"] = np.asarray(7, np.float32)

    path = rewrite(copy_set(golden / "evolq_losses.npz", tmp_path), change)
    assert failures(path) == {("5 losses", f"B32/pair{pair}/{name}") for pair, name in enumerate(names)}
    reports: list[str] = []
    assert run([golden / "evolq_losses.npz", path], reports.append) == 1
    assert [report.splitlines()[-1].split()[0] for report in reports] == ["PASS", "FAIL"]
    assert run([golden / "evolq_losses.npz"], reports.append) == 0
    assert "kl_dim0_batchmean" in reports[-1] and "not compared" in reports[-1]


def test_the_direction_of_the_recorded_divergence_matters(golden: Path, tmp_path: Path) -> None:
    """torch's kl_div(log_softmax(q), softmax(k)) is KL(k || q): with student and teacher exchanged it fails."""

    def change(arrays: Arrays) -> None:
        for key in [key for key in arrays if key.endswith("/q")]:
            pair = key.removesuffix("q")
            arrays[f"{pair}q"], arrays[f"{pair}k"] = arrays[f"{pair}k"], arrays[f"{pair}q"]

    path = rewrite(copy_set(golden / "evolq_losses.npz", tmp_path), change)
    assert {name for _, name in failures(path) if "kl" in name} == {
        f"B{batch}/pair{pair}/kl_dim1_batchmean" for batch in (32, 100) for pair in range(5)
    }


def test_every_recorded_quantizer_and_weight_has_a_row(golden: Path) -> None:
    path = golden / "evolq_fq_w4a8.npz"
    rows = {check.name for check in compare_file(path).checks}
    keys = {key for key in read(path) if key.startswith(("qweight/", "block_out/"))}
    keys |= {key for key in read(path) if key.startswith("param/") and key.endswith(("/scale", "/zero_point"))}
    assert keys <= rows
