"""The pipeline: which images may reach what, on a tiny ViT trained on a few digits."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cptv_jax.config.schema import CalibrationConfig, JudgeConfig, QuantizeConfig, SearchConfig, SpaceConfig
from cptv_jax.data import Images, load_digits
from cptv_jax.errors import InputError
from cptv_jax.models.architecture import Architecture
from cptv_jax.models.preprocessing import Preprocessing
from cptv_jax.models.vit import ViTConfig
from cptv_jax.models.vit_family import VIT
from cptv_jax.pipeline import quantize as pipeline
from cptv_jax.pipeline import search_phase
from cptv_jax.pipeline.outcome import Quantization
from cptv_jax.pipeline.quantize import quantize
from cptv_jax.quantized.model import Model
from cptv_jax.quantizers import BiasCorrected
from cptv_jax.recipe.resolve import RecipeConfig
from cptv_jax.runtime.forward import forward
from cptv_jax.search import Generational, Guided, Objective
from cptv_jax.search.events import Event, PassEnd, Proposed, Start, to_record
from cptv_jax.search.loop import Search
from cptv_jax.storage.files import lock

TINY = Architecture(
    "tiny",
    VIT,
    ViTConfig(image_size=32, patch_size=16, num_classes=10, width=32, depth=1, heads=2, mlp_ratio=2.0),
    Preprocessing(image_size=32, crop_fraction=1.0, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)),
)
BATCH = 10
CONFIG = QuantizeConfig(
    recipe=RecipeConfig(weight_bits=3),
    calibration=CalibrationConfig(images=40, batch=BATCH),
    # Three batches are searched, one is held out.
    search=SearchConfig(
        strategy=Generational(passes=2, children=3, rounds=1, sigma=0.1),
        judge=JudgeConfig(holdout=0.25),
        space=SpaceConfig(sites=("blocks.*.weight",)),
    ),
)


@pytest.fixture(scope="module")
def model() -> Model:
    """Random but for its last layer, which least squares fit to a few digits: some of the digits right."""
    images = load_digits("train").take(slice(0, 120))
    drawn = Model(TINY, TINY.initialize(0))
    batches = jnp.asarray(images.pixels).reshape(-1, BATCH, 32, 32, 3)
    features = np.concatenate([forward(drawn.stages(), batch).features for batch in batches])
    kernel, *_ = np.linalg.lstsq(features, 10 * np.eye(10)[images.require_labels()], rcond=1e-3)
    head = {**drawn.weights["head"], "fc": {**drawn.layer("head.fc"), "kernel": jnp.asarray(kernel, jnp.float32)}}
    return Model(TINY, {**drawn.weights, "head": head})


@pytest.fixture(scope="module")
def calibration() -> Images:
    return load_digits("calibration").take(slice(0, 40))


@pytest.fixture(scope="module")
def evaluation() -> Images:
    return load_digits("test").take(slice(0, 30))


@pytest.fixture(scope="module")
def outcome(model: Model, calibration: Images, evaluation: Images) -> Quantization:
    return quantize(model, calibration, CONFIG, evaluation=evaluation)


def changed(images: Images, **fields: Any) -> Images:
    values = {name: getattr(images, name) for name in ("pixels", "labels", "names", "mean", "std")}
    return Images(**{**values, **fields})


def quantizers(model: Any) -> list[np.ndarray]:
    return [np.asarray(leaf) for leaf in jax.tree.leaves(dict(model.quantizers))]


def assert_same_models(a: Quantization, b: Quantization) -> None:
    for one, other in ((a.base, b.base), (a.model, b.model)):
        assert list(one.quantizers) == list(other.quantizers)
        for x, y in zip(quantizers(one), quantizers(other), strict=True):
            np.testing.assert_array_equal(x, y)
    assert a.log == b.log


def same_base(a: Quantization, b: Quantization) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(quantizers(a.base), quantizers(b.base), strict=True))


def losses(log: Any) -> list[tuple[Any, ...]]:
    """The log without what the held-out images gave."""
    return [tuple(value for key, value in to_record(event).items() if key != "held_out") for event in log]


def held_out_losses(log: Sequence[Event]) -> list[float | None]:
    return [event.held_out for event in log if isinstance(event, Start | PassEnd)]


# Evaluation images


class Sealed:
    """Pixels whose shape may be known, and nothing else."""

    def __init__(self, pixels: np.ndarray) -> None:
        self.shape, self.dtype, self.ndim = pixels.shape, pixels.dtype, pixels.ndim

    def __len__(self) -> int:
        return self.shape[0]

    def __array__(self, *arguments: Any, **options: Any) -> np.ndarray:
        raise AssertionError("evaluation images were read before the search was over")

    __getitem__ = __iter__ = __array__


class Guarded(Images):
    """Evaluation images whose pixels may not be read before the search is over."""

    open = False

    def __getattribute__(self, name: str) -> Any:
        value = super().__getattribute__(name)
        return Sealed(value) if name == "pixels" and not Guarded.open else value


@pytest.fixture
def closed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guarded images open when the search hands back its final state, and to be told apart from calibration images."""
    Guarded.open = False
    told_apart = pipeline.check_unseen

    def check(evaluation: Images, calibration: Images) -> None:
        Guarded.open = True
        told_apart(evaluation, calibration)
        Guarded.open = False

    monkeypatch.setattr(pipeline, "check_unseen", check)
    search = pipeline.improve

    def search_then_open(*arguments: Any) -> Any:
        found = search(*arguments)
        Guarded.open = True
        return found

    monkeypatch.setattr(pipeline, "improve", search_then_open)


def test_evaluation_images_are_not_read_before_the_search_is_over(
    closed: None, model: Model, calibration: Images, evaluation: Images, outcome: Quantization
) -> None:
    guarded = Guarded(evaluation.pixels, evaluation.labels, evaluation.names, evaluation.mean, evaluation.std)
    for read in (lambda: guarded.normalize(0, 1), lambda: guarded.take([0]), lambda: np.asarray(guarded.pixels)):
        with pytest.raises(AssertionError, match="before the search"):
            read()
    found = quantize(model, calibration, CONFIG, evaluation=guarded)
    assert Guarded.open
    assert_same_models(found, outcome)
    assert found.results == outcome.results


@pytest.mark.slow
def test_a_guided_search_is_never_worse_and_reads_no_evaluation_image(
    closed: None, model: Model, calibration: Images, evaluation: Images, tmp_path: Path
) -> None:
    guarded = Guarded(evaluation.pixels, evaluation.labels, evaluation.names, evaluation.mean, evaluation.std)
    search = replace(CONFIG.search, strategy=Guided(steps=5, batch=10, passes=1))
    config = replace(CONFIG, search=search)
    found = quantize(model, calibration, config, evaluation=guarded, out=tmp_path / "run")
    assert Guarded.open
    assert found.log[-1].loss < found.log[0].loss
    proposals = [event for event in found.log if isinstance(event, Proposed)]
    assert any(event.fraction > 0 for event in proposals)
    assert [len(event.batch_losses) for event in proposals] == [0, 0, 1]
    assert (tmp_path / "run" / "proposals.png").stat().st_size > 0
    moved = found.model.quantizers["blocks.0.attn.qkv.weight"]
    assert isinstance(moved, BiasCorrected)
    np.testing.assert_array_equal(moved.base.zero_point, np.round(moved.base.zero_point))
    assert_same_models(quantize(model, calibration, config), found)


def test_the_result_is_the_same_whatever_the_evaluation_images(
    model: Model, calibration: Images, evaluation: Images, outcome: Quantization
) -> None:
    assert_same_models(quantize(model, calibration, CONFIG), outcome)
    mirrored = changed(evaluation, pixels=-evaluation.pixels[::-1], labels=9 - evaluation.require_labels())
    other = quantize(model, calibration, CONFIG, evaluation=mirrored)
    assert_same_models(other, outcome)
    assert other.results != outcome.results


def test_accuracies_are_those_of_the_models_handed_back(
    evaluation: Images, calibration: Images, model: Model, outcome: Quantization
) -> None:
    labels = evaluation.require_labels()
    for name, stages in (
        ("float", outcome.teacher.stages()),
        ("base", outcome.base.stages()),
        ("final", outcome.model.stages()),
    ):
        logits = np.asarray(forward(stages, jnp.asarray(evaluation.pixels)).logits)
        top5 = np.argsort(-logits, 1, kind="stable")[:, :5]
        found = outcome.results[name]
        assert found.top1 == pytest.approx(100 * np.mean(top5[:, 0] == labels))
        assert found.top5 == pytest.approx(
            100 * np.mean([label in row for label, row in zip(labels, top5, strict=True)])
        )
        assert found.images == 30
    assert outcome.results["float"].top1 > 20  # it has learnt something, so there is something to lose


# Calibration images


def test_labels_of_calibration_images_do_not_matter(
    model: Model, calibration: Images, evaluation: Images, outcome: Quantization
) -> None:
    for labels in (None, 9 - calibration.require_labels()):
        found = quantize(model, changed(calibration, labels=labels), CONFIG, evaluation=evaluation)
        assert_same_models(found, outcome)
        assert found.results == outcome.results


def held_out_rows(seed: int = CONFIG.seed) -> np.ndarray:
    """Where the held-out images lie: the last batch in the documented seeded order."""
    return np.random.default_rng([seed, 40]).permutation(40)[30:]


def test_held_out_images_reach_neither_calibration_nor_search(
    model: Model, calibration: Images, outcome: Quantization
) -> None:
    """Other held-out pixels change held-out losses and perhaps the choice among passes, and nothing else."""
    pixels = calibration.pixels.copy()
    pixels[held_out_rows()] = -pixels[held_out_rows()]
    found = quantize(model, changed(calibration, pixels=pixels), CONFIG)
    assert same_base(found, outcome)
    assert losses(found.log) == losses(outcome.log)
    judged = [held_out_losses(log) for log in (found.log, outcome.log)]
    assert len(judged[0]) == 3 and all(a != b for a, b in zip(*judged, strict=True))


def test_every_other_image_reaches_calibration_and_search(
    model: Model, calibration: Images, outcome: Quantization
) -> None:
    """The counterpart: the test above would pass if nothing reached anything."""
    rows = np.setdiff1d(np.arange(40), held_out_rows())[[0, 15, 29]]
    for row in rows:
        pixels = calibration.pixels.copy()
        pixels[row] *= 0.5  # within the range, so that the base method's min-max sites stay
        found = quantize(model, changed(calibration, pixels=pixels), CONFIG)
        assert losses(found.log) != losses(outcome.log)


def test_the_pass_with_the_least_held_out_loss_is_handed_back(
    model: Model, calibration: Images, outcome: Quantization
) -> None:
    chunk = jnp.asarray(calibration.pixels[held_out_rows()])
    found = Objective()(forward(outcome.model.stages(), chunk), forward(model.stages(), chunk))
    judged = [loss for loss in held_out_losses(outcome.log) if loss is not None]
    # One batch of ten, whose sums may be in another order.
    assert float(found) == pytest.approx(min(judged), rel=1e-6)


@pytest.mark.parametrize("held_out", [[1.0, 2.0, 3.0], [3.0, 1.0, 2.0]])
def test_a_search_that_only_fits_its_own_images_is_undone(
    monkeypatch: pytest.MonkeyPatch, model: Model, calibration: Images, held_out: list[float]
) -> None:
    """The start or the first pass is handed back where held-out losses, here made up, are least there."""
    remaining = iter(held_out)
    search, states = search_phase.run_search, []

    def with_made_up_losses(evaluator: Any, what: Search, *arguments: Any) -> Any:
        states.append(search(evaluator, replace(what, held_out_loss=lambda stages: next(remaining)), *arguments))
        return states[-1]

    monkeypatch.setattr(search_phase, "run_search", with_made_up_losses)
    found = quantize(model, calibration, CONFIG)
    (state,) = states
    best = int(np.argmin(held_out))
    assert state.best_pass == best
    for stage, sites in state.best_scales.items():
        for site, free in sites.items():
            np.testing.assert_array_equal(found.model.quantizers[f"{stage}.{site}"].scale, free.scale)
    if best == 0:
        for x, y in zip(quantizers(found.base), quantizers(found.model), strict=True):
            np.testing.assert_array_equal(x, y)


def test_a_search_without_held_out_images_ends_with_its_last_pass(model: Model, calibration: Images) -> None:
    search = replace(CONFIG.search, judge=JudgeConfig(holdout=0.0))
    found = quantize(model, calibration, replace(CONFIG, search=search))
    assert held_out_losses(found.log) == [None] * 3
    stages, teacher = found.model.stages(), model.stages()
    order = np.random.default_rng([0, 40]).permutation(40).reshape(4, BATCH)
    chunks = [jnp.asarray(calibration.pixels[rows]) for rows in order]
    values = [float(Objective()(forward(stages, chunk), forward(teacher, chunk))) for chunk in chunks]
    assert found.log[-1].loss == pytest.approx(np.mean(values), rel=1e-6)
    assert found.log[-1].loss < found.log[0].loss


def test_only_the_named_sites_change(outcome: Quantization) -> None:
    base, final = outcome.base.quantizers, outcome.model.quantizers
    moved = set()
    for site in base:
        before, after = (jax.tree.leaves(q[site]) for q in (base, final))
        if any(not np.array_equal(x, y) for x, y in zip(before, after, strict=True)):
            moved.add(site)
    assert moved <= {site for site in base if site.startswith("blocks.") and site.endswith(".weight")}
    losses = held_out_losses(outcome.log)
    first, last = losses[0], losses[-1]
    assert first is not None and last is not None and (moved or last >= first)


def test_the_seed_determines_the_result(model: Model, calibration: Images, outcome: Quantization) -> None:
    assert_same_models(quantize(model, calibration, CONFIG), outcome)
    other = quantize(model, calibration, replace(CONFIG, seed=1))
    assert losses(other.log) != losses(outcome.log)
    assert not same_base(other, outcome)  # other images are held out


def test_without_a_search_the_base_model_is_the_result(model: Model, calibration: Images, evaluation: Images) -> None:
    search = SearchConfig(strategy="none")
    found = quantize(model, calibration, replace(CONFIG, search=search), evaluation=evaluation)
    assert found.model is found.base and found.log == ()
    assert found.results["final"] == found.results["base"]


def test_a_finished_run_measures_other_evaluation_images_anew(
    model: Model, calibration: Images, evaluation: Images, tmp_path: Path
) -> None:
    first = quantize(model, calibration, CONFIG, out=tmp_path / "run", evaluation=evaluation)
    other = evaluation.take(slice(0, len(evaluation) // 2))
    again = quantize(model, calibration, CONFIG, out=tmp_path / "run", evaluation=other)
    assert first.results["final"].images == len(evaluation)
    assert again.results["final"].images == len(other)


def test_a_run_that_another_process_works_on_is_refused(model: Model, calibration: Images, tmp_path: Path) -> None:
    with lock(tmp_path / "run"):  # a lock belongs to the opened file, so this stands for another process
        with pytest.raises(InputError, match="another process is working in"):
            quantize(model, calibration, CONFIG, out=tmp_path / "run")
        assert [path.name for path in (tmp_path / "run").iterdir()] == [".lock"]


def test_images_of_another_size_are_refused(model: Model, calibration: Images) -> None:
    with pytest.raises(InputError, match="the images have shape"):
        quantize(model, changed(calibration, pixels=calibration.pixels[:, ::2, ::2]), CONFIG)


def test_evaluation_images_that_calibrate_are_refused_before_anything_is_written(
    model: Model, calibration: Images, evaluation: Images, tmp_path: Path
) -> None:
    pixels = evaluation.pixels.copy()
    pixels[3] = calibration.pixels[5]
    with pytest.raises(InputError, match=r"1 of the 30 evaluation images are calibration images too .*evaluate on oth"):
        quantize(model, calibration, CONFIG, evaluation=changed(evaluation, pixels=pixels), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"config": {"method": "omse"}}, "config is a dict; give a QuantizeConfig"),
        ({"config": "omse.yaml"}, "config is a str; give a QuantizeConfig"),
        ({"images": np.zeros((4, 32, 32, 3))}, "images is a ndarray; give Images"),
    ],
)
def test_arguments_of_another_type_are_refused_by_name(
    model: Model, calibration: Images, arguments: dict[str, Any], says: str
) -> None:
    with pytest.raises(InputError, match=says):
        quantize(**{"model": model, "images": calibration, "config": CONFIG, **arguments})
