"""Reconstruction within a run: off by default, killed at any step and continued to the same bits."""

from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from stopped_runs import CONFIG, DEEPER, Saboteur, assert_same, outcome_of, tiny_model
from tiny_vit import TINY

from cptv_jax import (
    InputError,
    Quantization,
    QuantizeConfig,
    QuantizedModel,
    ReconstructionConfig,
    SearchConfig,
    load_images,
    quantize,
)
from cptv_jax.pipeline import quantize as pipeline

RECONSTRUCTED = replace(
    CONFIG, reconstruction=ReconstructionConfig(steps=2, batch=8), search=SearchConfig(strategy="none")
)


def run(config: QuantizeConfig, out: Path | None = None) -> Quantization:
    images = load_images("digits:calibration", TINY.preprocessing, labels=False, limit=24)
    return quantize(tiny_model(DEEPER), images, config, out=out)


def leaves(model: QuantizedModel) -> list[np.ndarray]:
    return [np.asarray(leaf) for leaf in jax.tree.leaves([model.model.weights, dict(model.quantizers)])]


@pytest.mark.slow
def test_a_kill_in_any_writing_step_of_a_reconstruction_leaves_a_run_that_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outcome = run(RECONSTRUCTED, tmp_path / "whole")
    expected = outcome_of(tmp_path / "whole")
    assert outcome.model is outcome.base
    assert not any("reconstruction/" in name for name in expected)
    plain = run(replace(RECONSTRUCTED, reconstruction=ReconstructionConfig()))
    assert any(np.any(a != b) for a, b in zip(leaves(outcome.base), leaves(plain.base), strict=True))
    saboteur = Saboteur(tmp_path / "killed", monkeypatch, only="reconstruction")
    saboteur.go_on_until_done(lambda: run(RECONSTRUCTED, tmp_path / "killed"))
    saboteur.assert_struck(
        "save reconstruction/.000000.tmp/arrays",
        "replace reconstruction/000000",
        "save reconstruction/.000003.tmp/arrays",
        "replace reconstruction/000004",
        "rmtree reconstruction/000003",
        "rmtree reconstruction",
    )
    assert_same(tmp_path / "killed", expected)


@pytest.mark.slow
def test_without_steps_nothing_is_reconstructed(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object) -> None:
        raise AssertionError("reconstructed")

    monkeypatch.setattr(pipeline, "reconstruct", fail)
    run(replace(RECONSTRUCTED, reconstruction=ReconstructionConfig(batch=8)))


@pytest.mark.parametrize(
    ("field", "value"),
    [("steps", -1), ("batch", 0), ("images", 0), ("float_input", 1.5), ("scale_rate", -1e-3), ("weight_rate", np.inf)],
)
def test_settings_that_cannot_work_are_named(field: str, value: float) -> None:
    with pytest.raises(InputError, match=rf"^{field} is .*; it must"):
        ReconstructionConfig(**{field: value})  # type: ignore[arg-type]
