"""Recordings of PTQ4ViT and its baseline pass; each step of the comparison can fail; only ties are excused."""

from pathlib import Path
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest
from interchange_files import Arrays, change_meta, copy_set, rewrite

from cptv_jax.calibration.interval_search import OperandSearch, scale_by_factors
from cptv_jax.compare import Comparison, compare_file, render
from cptv_jax.compare.ptq4vit import Replay, check_ties, replay
from cptv_jax.errors import InputError
from cptv_jax.quantizers import Uniform

slow = pytest.mark.slow
FACTORS = np.asarray([0.5, 0.75, 1.0], np.float32)


@slow
@pytest.mark.parametrize("name", ["ptq4vit_l2_w6a6", "ptq4vit_hessian_w6a6", "baseptq_cosine_w6a6"])
def test_recordings_pass(golden: Path, name: str) -> None:
    comparison = compare_file(golden / f"{name}.npz")
    assert comparison.passed, render(comparison)


def failures(comparison: Comparison) -> set[tuple[str, str]]:
    return {(check.group.split(",")[0], check.name) for check in comparison.checks if not check.passed}


@slow
def test_each_step_can_fail(golden: Path, tmp_path: Path) -> None:
    def change(arrays: Arrays) -> None:
        arrays["raw_grad/head"] *= np.float32(1.01)
        arrays["init/blocks.0.attn.qkv/w_interval"] *= np.float32(1.01)
        arrays["search/blocks.1.mlp.fc1/5"] = np.roll(arrays["search/blocks.1.mlp.fc1/5"], 3)  # another best candidate
        arrays["param/blocks.0.attn.matmul1/B_interval"][0, 1] *= np.float32(1.01)
        arrays["qweight/blocks.0.attn.qkv"][:8] *= np.float32(1.05)
        arrays["block_out/2"][..., ::8] += np.float32(0.1)
        arrays["q_logits"] = np.roll(arrays["q_logits"], 1, -1)
        arrays["q_top1"] = arrays["q_top1"] - np.float32(5)

    comparison = compare_file(rewrite(copy_set(golden / "ptq4vit_hessian_w6a6.npz", tmp_path), change))
    assert failures(comparison) == {
        ("0 gradients", "raw_grad/head"),
        ("1 initial intervals", "all"),
        ("1 search", "search/blocks.1.mlp.fc1"),
        # The changed one, and the activation that our own choice differs from the changed table's in.
        ("1 quantizer parameters", "all"),
        ("2 dequantized weights", "all"),
        ("3 blocks alone", "block_out/2"),
        ("4 quantized logits", "mean difference"),
        ("4 quantized logits", "predictions that differ"),
        ("4 quantized logits", "top-1"),
    }


@slow
def test_another_metric_or_variant_than_recorded_fails(golden: Path, tmp_path: Path) -> None:
    path = copy_set(golden / "baseptq_cosine_w6a6.npz", tmp_path)
    comparison = compare_file(change_meta(path, lambda meta: meta.update(metric="l2")))
    found = failures(comparison)
    assert sum(group == "1 search" for group, _ in found) >= 5


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("metric", "pearson", "meta.metric is 'pearson'; supported: hessian, l2, cosine"),
        ("variant", "new", "meta.variant is 'new'; supported: ptq4vit, base"),
        ("search", {"alpha": 0.5, "beta": 1.2, "candidates": 100, "rounds": 0}, "meta.search.rounds is 0"),
        ("search", {"alpha": 0.5, "beta": 1.2, "rounds": 1}, "meta lacks 'search.candidates'"),
        ("search", {"alpha": 1.5, "beta": 1.2, "candidates": 100, "rounds": 1}, "0 < alpha < beta"),
    ],
)
def test_meta_that_describes_no_run_is_refused(
    golden: Path, tmp_path: Path, field: str, value: object, message: str
) -> None:
    path = change_meta(copy_set(golden / "baseptq_cosine_w6a6.npz", tmp_path), lambda meta: meta.update({field: value}))
    with pytest.raises(InputError, match=message):
        compare_file(path)


def test_missing_and_surplus_arrays_are_named(golden: Path, tmp_path: Path) -> None:
    path = copy_set(golden / "ptq4vit_hessian_w6a6.npz", tmp_path)
    with pytest.raises(InputError, match="lacks the array 'logit_grad'"):
        compare_file(rewrite(path, lambda arrays: arrays.pop("logit_grad")))
    path = copy_set(golden / "ptq4vit_l2_w6a6.npz", tmp_path)
    with pytest.raises(InputError, match=r"param/blocks\.7\.mlp\.fc1' belongs to no layer"):
        compare_file(rewrite(path, lambda arrays: arrays.update({"param/blocks.7.mlp.fc1/w_interval": np.ones(1)})))


class _Table:
    """A search of one operand whose losses are given, standing in for LayerSearch."""

    def __init__(self, losses: np.ndarray, metric: str) -> None:
        scale = jnp.ones(losses.shape[1:])
        initial = Uniform(scale, jnp.zeros_like(scale), jnp.float32(-8), jnp.float32(7))
        self.operands = (OperandSearch(), OperandSearch(initial, scale_by_factors(initial, FACTORS)))
        self.layer, self.order, self.options = SimpleNamespace(sites=("x", "w")), [1], SimpleNamespace(metric=metric)
        self._losses = losses

    def losses(self, side: int, choices: object) -> np.ndarray:
        return self._losses


def replayed(golden: Path, losses: list[float], similarities: list[float], metric: str = "l2"):  # type: ignore[no-untyped-def]
    from cptv_jax.compare.interchange import Meta, Recording

    recording = Recording(golden, {"search/m/0": np.asarray(similarities)}, Meta(golden, {}), "quantized", "ptq4vit")
    return replay(recording, "m", _Table(np.asarray(losses), metric), 1)  # type: ignore[arg-type]


def test_only_a_tie_is_excused_and_then_the_recorded_choice_taken(golden: Path) -> None:
    same = replayed(golden, [3, 1, 2], [-3, -1, -2])
    assert same.check.passed and same.check.equal == 1 and same.quantizers["w"].scale == FACTORS[1]
    tie = replayed(golden, [3, 1, 1.0002], [-3, -1.0005, -1])
    assert tie.check.passed and tie.check.remark == "1 ties" and tie.quantizers["w"].scale == FACTORS[2]
    wrong = replayed(golden, [3, 1, 1.0002], [-3, -1.01, -1])
    assert not wrong.check.passed and wrong.quantizers["w"].scale == FACTORS[1]
    assert not replayed(golden, [0.3, 0.1, 0.2], [96 - 0.3, 96 - 0.101, 96 - 0.1], "cosine").check.passed
    assert replayed(golden, [0.3, 0.1, 0.2], [95.7, 95.9 - 1e-5, 95.9], "cosine").check.passed


@pytest.mark.parametrize(("tied", "passed"), [((1, 1), True), ((1, 2), False), ((0, 0), True)])
def test_so_many_ties_that_noise_cannot_be_their_reason_fail(tied: tuple[int, int], passed: bool) -> None:
    [check] = check_ties([Replay({}, {}, None, 100, number) for number in tied])
    assert check.measured == sum(tied) and check.passed is passed


def test_one_choice_of_few_may_be_a_tie() -> None:
    assert check_ties([Replay({}, {}, None, 3, 1)])[0].passed and not check_ties([Replay({}, {}, None, 3, 2)])[0].passed
    assert check_ties([Replay({}, {})]) == []
