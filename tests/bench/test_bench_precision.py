"""`cptv bench precision`: a curve whose mixed points are no larger than the uniform ones, and that can be continued."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tiny_vit import TINY

from cptv_jax import InputError, Model, QuantizeConfig, evaluate, load_images, load_model, save_model
from cptv_jax.bench import precision as bench
from cptv_jax.bench.harness import Source
from cptv_jax.bench.precision import PrecisionOptions, bench_precision, markdown
from cptv_jax.config.schema import CalibrationConfig, ComputeConfig, JudgeConfig, SearchConfig
from cptv_jax.pipeline.judging import evaluator_of
from cptv_jax.reconstruction.config import ReconstructionConfig
from cptv_jax.search import Objective


@pytest.fixture
def options(tmp_path: Path) -> PrecisionOptions:
    save_model(tmp_path / "tiny", Model(TINY, TINY.initialize(0)))
    source = Source(str(tmp_path / "tiny"), "digits:calibration", "digits:test")
    config = QuantizeConfig(calibration=CalibrationConfig(16, 8))
    return PrecisionOptions(source, tmp_path / "out", (2, 3, 8), 16, generations=2, children=2, config=config)


@pytest.mark.parametrize(("named", "expected"), [(None, "kl"), ("mse", "mse")])
def test_kl_judges_unless_an_objective_is_named(
    options: PrecisionOptions, monkeypatch: pytest.MonkeyPatch, named: str | None, expected: str
) -> None:
    class Stopped(Exception):
        pass

    def judging(stages: Any, batches: Any, teacher: Any, objective: Objective, *rest: Any) -> None:
        assert objective == Objective(expected)
        raise Stopped

    monkeypatch.setattr(bench, "evaluator_of", judging)
    config = replace(options.config, search=SearchConfig(judge=JudgeConfig(objective=named)))
    with pytest.raises(Stopped):
        bench_precision(replace(options, config=config), progress=False)


@pytest.mark.slow
def test_mixed_widths_are_no_larger_and_no_worse_by_the_objective(
    options: PrecisionOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = bench_precision(options, progress=False)
    assert [line["bits"] for line in lines] == [2, 3, 8] and "mixed" not in lines[-1]
    test = load_images("digits:test", TINY.preprocessing, labels=True)
    for line in lines[:-1]:
        assert line["mixed"]["objective"] <= line["mixed"]["start"] <= line["uniform"]["objective"]
        saved = load_model(str(options.out / f"mixed-{line['bits']}"))
        sizes = [
            saved.model.layer(site.removesuffix(".weight"))["kernel"].size * spec.bits / 8
            for site, spec in saved.recipe.sites.items()
            if site.endswith(".weight")
        ]
        assert sum(sizes) <= line["cost"]
        assert line["mixed"]["top1"] == evaluate(saved.stages(), test).top1
    assert (options.out / "precision.png").stat().st_size > 0
    assert (options.out / "precision.md").read_text() == markdown(lines)
    # What is measured is not measured again.
    monkeypatch.setattr(bench, "evaluate", lambda *given: pytest.fail("measured again"))
    assert bench_precision(options, progress=False) == lines


def test_activations_are_chosen_within_a_budget_of_bit_operations(options: PrecisionOptions) -> None:
    options = replace(options, genes="all", budget="bit-operations", generations=1)
    line, _, widest = bench_precision(options, progress=False)
    assert widest["cost"] == 16 * line["cost"]  # 8 bits of both operands instead of 2
    saved = load_model(str(options.out / "mixed-2"))
    assert set(line["mixed"]["genes"]) > {"blocks.0.norm1", "blocks.0.attn.qkv.weight"}
    assert all(saved.recipe.sites[site].bits == (2, 3, 8)[gene] for site, gene in line["mixed"]["genes"].items())
    assert "| as uniform | 10^9 bit operations an image |" in (options.out / "precision.md").read_text()


def test_an_interrupted_bench_goes_on(options: PrecisionOptions, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = bench_precision(replace(options, out=options.out.parent / "whole"), progress=False)
    original, calls = bench.evaluate, []

    def interrupted(*given: Any) -> Any:
        calls.append(given)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(*given)

    with monkeypatch.context() as patch:
        patch.setattr(bench, "evaluate", interrupted)
        with pytest.raises(KeyboardInterrupt):
            bench_precision(options, progress=False)
    assert len(json.loads((options.out / "precision-measured.json").read_text())) == 3  # sensitivity, 2 bits twice
    assert bench_precision(options, progress=False) == whole


def test_evaluation_images_decide_nothing(options: PrecisionOptions) -> None:
    lines = bench_precision(options, progress=False)
    source = replace(options.source, evaluation="digits:train")
    others = bench_precision(replace(options, source=source, out=options.out.parent / "other"), progress=False)
    for line, other in zip(lines, others, strict=True):
        for kind in ("uniform", "mixed"):
            one, two = (found.get(kind, {}) for found in (line, other))
            assert {**one, "top1": None} == {**two, "top1": None}
    assert [line["uniform"]["top1"] for line in lines] != [line["uniform"]["top1"] for line in others]


def test_bounds_on_memory_change_no_result(options: PrecisionOptions, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = bench_precision(options, progress=False)
    at_once = []

    def judged(stages: Any, batches: Any, teacher: Any, objective: Any, compute: Any, *rest: Any) -> Any:
        evaluator = evaluator_of(stages, batches, teacher, objective, compute, *rest)
        at_once.append(evaluator.images)
        return evaluator

    monkeypatch.setattr(bench, "evaluator_of", judged)
    config = replace(options.config, search=SearchConfig(compute=ComputeConfig(images_at_once=4)))
    parts = bench_precision(replace(options, config=config, out=options.out.parent / "parts"), progress=False)
    assert at_once == [4] and parts == whole


def test_settings_that_cannot_work_are_refused(options: PrecisionOptions) -> None:
    for judges in (7, 17):
        with pytest.raises(InputError, match=r"--judges is \d+; it must lie between calibration.batch, 8, and .*, 16"):
            bench_precision(replace(options, images=judges))
    for field, number in (("generations", -1), ("children", 0)):
        with pytest.raises(InputError, match=f"is {number}; it must be at least"):
            bench_precision(replace(options, **{field: number}))  # type: ignore[arg-type]
    for change, message in (
        ({"search": SearchConfig(compute=ComputeConfig(race=True))}, "search.compute.race is True, which has no me"),
        (
            {"search": SearchConfig(judge=JudgeConfig(teacher="published"))},
            "search.judge.teacher is published, which",
        ),
        ({"method": "erq"}, "method erq makes other weights at every width; .*set method to fq-vit or omse$"),
        ({"method": "ptq4vit"}, "method ptq4vit fits other scales of activations .*fq-vit or omse, or .*--genes all"),
        ({"reconstruction": ReconstructionConfig(steps=5)}, r"reconstruction\.steps is 5.*leave it out"),
    ):
        with pytest.raises(InputError, match=message):
            bench_precision(replace(options, config=replace(options.config, **change)))  # type: ignore[arg-type]
    assert not options.out.exists()
    with pytest.raises(InputError, match=r"--budget is 'bit-operation'.*bit-operations"):
        bench_precision(replace(options, budget="bit-operation"))
    with pytest.raises(InputError, match=r"--genes is 'weight'.*weights"):
        bench_precision(replace(options, genes="weight"))
    with pytest.raises(InputError, match="cost no bytes; set --budget bit-operations"):
        bench_precision(replace(options, genes="all"))
    with pytest.raises(InputError, match="needs 2 widths or more"):
        bench_precision(replace(options, bits=(4,)))
    with pytest.raises(InputError, match="evaluation images are calibration images too"):
        bench_precision(replace(options, source=replace(options.source, evaluation="digits:calibration")))
    bench_precision(replace(options, bits=(2, 8), generations=0), progress=False)
    with pytest.raises(InputError, match="holds a bench with other settings"):
        bench_precision(replace(options, bits=(3, 8)), progress=False)


def test_damaged_measurements_are_named_with_the_remedy(options: PrecisionOptions) -> None:
    bench_precision(replace(options, bits=(2, 8), generations=0), progress=False)
    path = options.out / "precision-measured.json"
    path.write_text(path.read_text()[:-9])
    with pytest.raises(InputError, match=r"precision-measured\.json is damaged; remove it, and the same command"):
        bench_precision(replace(options, bits=(2, 8), generations=0), progress=False)
