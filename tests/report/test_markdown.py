"""The report of a run."""

import re
from dataclasses import replace
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from tiny_vit import TINY

from cptv_jax import (
    CalibrationConfig,
    Model,
    Quantization,
    QuantizeConfig,
    RecipeConfig,
    SearchConfig,
    load_images,
    quantize,
)
from cptv_jax.config.loading import config_from
from cptv_jax.config.yaml12 import read_yaml
from cptv_jax.models.architecture import sites_of
from cptv_jax.quantizers import LowRank, Uniform
from cptv_jax.recipe.spec import SiteSpec
from cptv_jax.report.markdown import site_table
from cptv_jax.report.plots import plot_losses
from cptv_jax.search import Generational
from cptv_jax.search.events import Accepted, PassEnd, Start

CONFIG = QuantizeConfig(
    recipe=RecipeConfig(
        preset="fq-vit", weight_bits=4, overrides={"*.attn.query": {"bits": 5}, "head.fc": None, "embed.input": None}
    ),
    calibration=CalibrationConfig(images=16, batch=8),
    search=SearchConfig(strategy=Generational(passes=2, rounds=1, children=4)),
)


@pytest.fixture(scope="module")
def outcome() -> Quantization:
    model = Model(TINY, TINY.initialize(0), "tiny.safetensors", "0123456789abcdef0123")
    images = load_images("digits:calibration", TINY.preprocessing, labels=False, limit=16)
    test = load_images("digits:test", TINY.preprocessing, labels=True, limit=30)
    return quantize(model, images, CONFIG, evaluation=test)


@pytest.fixture
def text(outcome: Quantization, tmp_path: Path) -> str:
    path = outcome.report(tmp_path / "report")
    assert path == tmp_path / "report" / "report.md"
    return path.read_text()


def rows(table: str) -> dict[str, list[str]]:
    found = [line.strip("| ").split("|") for line in table.splitlines() if line.startswith("| `")]
    names = [cells[0].strip(" `") for cells in found]
    assert len(set(names)) == len(names)
    return {name: [cell.strip() for cell in cells[1:]] for name, cells in zip(names, found, strict=True)}


def test_every_site_stands_in_the_table_once(text: str, outcome: Quantization) -> None:
    table = rows(text)
    quantized = outcome.model.recipe.sites
    assert list(table) == [site.name for site in sites_of(TINY) if site.kind != "operand" or site.name in quantized]
    for name, cells in table.items():
        assert (cells[0] == "float") == (name not in quantized)
        if name in quantized:
            assert cells[1] == str(quantized[name].bits)
    assert table["blocks.0.attn.query"][1] == "5"
    assert table["head.fc"][0] == table["embed.input"][0] == "float"
    assert table["blocks.0.attn.softmax"] == ["log2", "4", "per tensor", "fixed levels"]
    assert table["head.fc.weight"] == ["uniform signed symmetric", "4", "per channel", "minmax"]


def test_a_row_says_all_of_a_specification(outcome: Quantization) -> None:
    spec = SiteSpec(bits=3, per_channel=True, observer="omse", bias_correction=True)
    recipe = replace(outcome.model.recipe, sites={"head.fc.weight": spec})
    table = rows(site_table(replace(outcome, model=replace(outcome.model, recipe=recipe))))
    assert table["head.fc.weight"] == ["uniform unsigned asymmetric", "3", "per channel", "omse, bias correction"]
    assert table["blocks.0.norm1"][0] == "float"


def test_a_float_term_beside_a_weight_stands_in_its_row_with_its_rank(outcome: Quantization) -> None:
    site, model = "blocks.0.attn.qkv.weight", outcome.model
    inputs, outputs = model.model.layer("blocks.0.attn.qkv")["kernel"].shape
    down = jnp.zeros((inputs, 4)).at[:, :3].set(1.0)  # the last column is padding
    base = model.quantizers[site]
    assert isinstance(base, Uniform)
    term = LowRank(base, down, jnp.ones((4, outputs)))
    changed = replace(outcome, model=replace(model, quantizers={**model.quantizers, site: term}))
    assert rows(site_table(changed))[site][-1] == "minmax, float term of rank 3"


def test_the_accuracies_are_those_measured(text: str, outcome: Quantization) -> None:
    for name, label in (("float", "full precision"), ("base", "base method"), ("final", "after the search")):
        result = outcome.results[name]
        assert f"| {label} | {result.top1:.2f} | {result.top5:.2f} | 30 |" in text


def test_the_search_is_summed_up(text: str, outcome: Quantization) -> None:
    passes = [event for event in outcome.log if isinstance(event, PassEnd)]
    assert len(passes) == 2
    for event in passes:
        assert f"| pass {event.number} | {event.loss:.5f} | {event.held_out:.5f} | {event.evaluations} |" in text
    accepted = sum(isinstance(event, Accepted) for event in outcome.log)
    assert f"{accepted} steps were accepted; the row with the least held-out loss is the result." in text


def test_where_everything_came_from_is_said(text: str, outcome: Quantization) -> None:
    assert text.startswith("# tiny_vit, fq-vit, recipe fq-vit\n")
    assert "Weights: tiny.safetensors (sha256 0123456789abcdef...)." in text
    assert "softmax in integer (log-int-softmax)." in text
    found = re.search(r"```yaml\n(.*?)```", text, re.DOTALL)
    assert found is not None
    # What the method decides is filled in.
    told = config_from(read_yaml(found[1], "report"), "report")
    assert told.reconstruction.steps == 0 and told == outcome.config
    assert (told.search.judge.objective, told.search.judge.images) == ("infonce", 8)
    assert replace(told, reconstruction=CONFIG.reconstruction, search=CONFIG.search) == CONFIG
    assert re.search(r"python 3\.\d+\.\d+, cptv-jax .*, jax \d", text)


def test_the_loss_curve_is_a_picture(text: str, tmp_path: Path) -> None:
    assert "![Loss of accepted steps](loss.png)" in text
    with Image.open(tmp_path / "report" / "loss.png") as picture:
        assert picture.format == "PNG"
        assert picture.size == (770, 440)
        assert np.asarray(picture.convert("L")).std() > 5  # something is drawn
    assert sorted(path.name for path in (tmp_path / "report").iterdir()) == ["loss.png", "report.md"]


def test_without_search_or_evaluation_it_says_so(outcome: Quantization, tmp_path: Path) -> None:
    text = replace(outcome, log=(), results={}).report(tmp_path).read_text()
    assert "No search was run." in text
    assert "No evaluation images were given." in text
    assert [path.name for path in tmp_path.iterdir()] == ["report.md"]


def test_without_held_out_images_the_last_pass_is_the_result(outcome: Quantization, tmp_path: Path) -> None:
    log = tuple(replace(e, held_out=None) if isinstance(e, Start | PassEnd) else e for e in outcome.log)
    text = replace(outcome, log=log).report(tmp_path).read_text()
    assert "the last row is the result." in text
    plot_losses(tmp_path / "other.png", log)
    assert (tmp_path / "other.png").stat().st_size > 1000
