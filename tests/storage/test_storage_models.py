"""Checkpoints: what is saved comes back bit for bit, and nothing is overwritten."""

import hashlib
import json
import os
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from tiny_vit import TINY

from cptv_jax import (
    InputError,
    Model,
    QuantizedModel,
    RecipeConfig,
    SiteSpec,
    forward,
    load_float_model,
    load_images,
    load_model,
    resolve,
    save_model,
)
from cptv_jax.cli.main import main
from cptv_jax.methods.registry import METHODS
from cptv_jax.models.architecture import sites_of
from cptv_jax.quantizers import QUANTIZER_CLASSES
from cptv_jax.storage.files import write_atomically
from cptv_jax.storage.trees import read_metadata, restore_tree, save_tree

RECIPES = {
    "fq-vit": RecipeConfig(preset="fq-vit"),  # signed weights and Log2
    "evol-q": RecipeConfig(weight_bits=3),  # bias correction
    "mixed": RecipeConfig(
        preset="fq-vit",
        weight_bits=4,
        overrides={
            "*.fc1.weight": {"bits": 2, "bias_correction": True},
            "*.attn.query": {"bits": 5},
            "head.*": None,
            "blocks.0.norm1": {"per_channel": True, "observer": "ptf"},
        },
    ),
}


@pytest.fixture(scope="module")
def model() -> Model:
    return Model(TINY, TINY.initialize(0), "somewhere", "0123abcd")


@pytest.fixture(scope="module")
def batch() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((8, 32, 32, 3)).astype(np.float32)


@pytest.fixture(params=RECIPES)
def quantized(request: pytest.FixtureRequest, model: Model, batch: np.ndarray) -> QuantizedModel:
    recipe = resolve(RECIPES[request.param], sites_of(TINY))
    return METHODS["fq-vit"].quantize(model, [jax.numpy.asarray(batch)] * 2, recipe, jax.random.key(0))


def assert_same_bits(found: Any, expected: Any) -> None:
    assert jax.tree.structure(found) == jax.tree.structure(expected)  # type: ignore[operator]
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        a, b = np.asarray(a), np.asarray(b)
        assert (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes())


def test_a_float_model_comes_back_bit_for_bit(model: Model, tmp_path: Path) -> None:
    values = np.array([np.nan, -0.0, 1e-45, np.inf, 3.0], np.float32)  # bits, not values
    weights = jax.tree.map(lambda a: jax.numpy.asarray(np.resize(values, a.shape)), model.weights)
    model = replace(model, weights=weights)
    save_model(tmp_path / "m", model)
    again = load_float_model(str(tmp_path / "m"))
    assert_same_bits(again.weights, model.weights)
    assert list(again.weights) == list(model.weights)
    assert (again.architecture, again.source, again.sha256) == (TINY, "somewhere", "0123abcd")


def test_a_quantized_model_comes_back_bit_for_bit(quantized: QuantizedModel, batch: np.ndarray, tmp_path: Path) -> None:
    save_model(tmp_path / "q", quantized)
    again = load_model(str(tmp_path / "q"))
    assert isinstance(again, QuantizedModel)
    assert again.recipe == quantized.recipe
    assert list(again.recipe.sites) == list(again.quantizers) == list(quantized.quantizers)
    assert {site: type(q) for site, q in again.quantizers.items()} == {
        site: type(q) for site, q in quantized.quantizers.items()
    }
    assert_same_bits(dict(again.quantizers), dict(quantized.quantizers))
    assert_same_bits(again.model.weights, quantized.model.weights)
    assert_same_bits(forward(again.stages(), batch), forward(quantized.stages(), batch))
    with pytest.raises(InputError, match="is quantized already; give the float model"):
        load_float_model(str(tmp_path / "q"))


def test_the_recipes_above_hold_every_quantizer_and_mixed_bits(model: Model) -> None:
    sites = sites_of(TINY)
    specs = [spec for config in RECIPES.values() for spec in resolve(config, sites).sites.values()]
    assert {spec.quantizer for spec in specs} == {"uniform", "log2"}
    assert {spec.bias_correction for spec in specs} == {True, False}
    assert {spec.bits for spec in resolve(RECIPES["mixed"], sites).sites.values()} == {2, 4, 5, 8}
    # A new one needs a recipe here, or a test of its method that saves and loads its result.
    elsewhere = {
        "DualUniform", "FractionalUniform", "OffsetUniform", "LogSqrt2", "TwinSoftmax", "TwinGelu", "Focusing",
        "LowRank", "RankSearch",
    }  # fmt: skip
    own = {name for name, cls in QUANTIZER_CLASSES.items() if cls.__module__.startswith("cptv_jax.")}
    assert own - elsewhere == {"Uniform", "Log2", "BiasCorrected"}


def test_the_description_says_what_is_inside(quantized: QuantizedModel, tmp_path: Path) -> None:
    save_model(tmp_path / "q", quantized)
    metadata = json.loads((tmp_path / "q" / "metadata.json").read_text())
    assert metadata["kind"] == "quantized"
    described: dict[str, Any] = {"name": TINY.name, "family": "vit"}
    described |= {"config": asdict(TINY.config), "preprocessing": asdict(TINY.preprocessing)}
    assert metadata["architecture"] == json.loads(json.dumps(described))
    assert metadata["architecture"]["preprocessing"]["mean"] == [0.5, 0.5, 0.5]
    assert (metadata["source"], metadata["sha256"]) == ("somewhere", "0123abcd")
    assert {site: SiteSpec(**spec) for site, spec in metadata["recipe"]["sites"].items()} == quantized.recipe.sites
    for name, digest in metadata["files"].items():
        assert hashlib.sha256((tmp_path / "q" / "arrays" / name).read_bytes()).hexdigest() == digest


def test_nothing_is_overwritten(model: Model, tmp_path: Path) -> None:
    save_model(tmp_path / "m", model)
    before = (tmp_path / "m" / "metadata.json").read_bytes()
    (tmp_path / "file").write_text("mine")
    for path in (tmp_path / "m", tmp_path / "file", tmp_path):
        with pytest.raises(InputError, match="exists already; choose another name or remove it first"):
            save_model(path, model)
    assert (tmp_path / "m" / "metadata.json").read_bytes() == before
    assert (tmp_path / "file").read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "m"]


def test_a_save_that_fails_leaves_nothing_under_the_name(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            save_model(tmp_path / "m", model)
    assert not (tmp_path / "m").exists()
    save_model(tmp_path / "m", model)  # what was left does not disturb
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_text_is_replaced_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.json"
    write_atomically(path, "old")

    def fail(*args: object) -> None:
        raise OSError("interrupted")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fail)
        with pytest.raises(OSError, match="interrupted"):
            write_atomically(path, "new")
    assert path.read_text() == "old"
    write_atomically(path, "newer, with ü")
    assert path.read_text(encoding="utf-8") == "newer, with ü"
    assert [found.name for found in tmp_path.iterdir()] == ["a.json"]


def test_a_disk_without_room_is_named_and_nothing_is_left_there(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    needed = sum(leaf.nbytes for leaf in jax.tree.leaves(model.weights))
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=needed - 1))
        with pytest.raises(
            InputError, match=r"m needs 0\.\d MB, but 0\.\d MB are left on its disk; make room or choose"
        ):
            save_model(tmp_path / "m", model)
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fills_up_in_between_is_left_as_it_was(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Any, path: Path, arrays: Any) -> None:
        path.mkdir(parents=True)
        (path / "half").touch()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ocp.PyTreeCheckpointer, "save", full)
    with pytest.raises(OSError, match="No space left"):
        save_model(tmp_path / "m", model)
    assert list(tmp_path.iterdir()) == []


def test_a_path_that_is_not_utf_8_is_written_with_escapes_and_refused_as_a_place(model: Model, tmp_path: Path) -> None:
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/mod\xe8les"))
    write_atomically(tmp_path / "report.md", f"weights: {folder.name}")
    assert (tmp_path / "report.md").read_text(encoding="utf-8") == r"weights: mod\udce8les"
    folder.mkdir()
    for use in (lambda: save_model(folder / "m", model), lambda: load_model(str(folder))):
        with pytest.raises(InputError, match=r"mod\\udce8les.* is not valid UTF-8; rename it or choose another folder"):
            use()
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("damage", ["remove", "truncate", "flip"])
def test_damage_to_any_file_is_found(model: Model, tmp_path: Path, damage: str) -> None:
    save_model(tmp_path / "m", model)
    files = [path for path in sorted((tmp_path / "m" / "arrays").rglob("*")) if path.is_file()]
    assert len(files) > 3
    for file in files:
        content = file.read_bytes()
        if damage == "remove":
            file.unlink()
        elif damage == "truncate" and content:
            file.write_bytes(content[:-1])
        else:
            file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]) if content else b"x")
        with pytest.raises(InputError, match=f"{file.name} is (missing|damaged); import or quantize again"):
            load_model(str(tmp_path / "m"))
        file.write_bytes(content)
    load_model(str(tmp_path / "m"))


def test_trees_keep_their_types_and_scalars(tmp_path: Path) -> None:
    tree = {
        "a": {"b": np.arange(6, dtype=np.uint8).reshape(2, 3), "c": np.float32(0.1)},
        "blocks.0.attn.qkv.weight": np.full((1, 4), 1e-45, np.float32),
        "d": np.array([1, -(2**31)], np.int32),
    }
    save_tree(tmp_path / "t", tree, {"kind": "test", "list": [1, None]})
    found, metadata = restore_tree(tmp_path / "t")
    assert_same_bits(found, tree)
    assert metadata["list"] == [1, None]
    assert read_metadata(tmp_path / "t") == metadata


def test_a_checkpoint_can_be_moved(model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save_model(Path("m"), model)  # by a relative path
    shutil.move("m", "other name")
    assert_same_bits(load_float_model("other name").weights, model.weights)


def test_the_real_deit_tiny_imported_gives_the_same_logits(
    shared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    raw = shared / "weights" / "deit_tiny_patch16_224.safetensors"
    with pytest.raises(SystemExit) as ended:
        main(["import", str(raw), "--out", str(tmp_path / "deit")])
    assert ended.value.code == 0
    sha256 = hashlib.sha256(raw.read_bytes()).hexdigest()
    assert sha256[:16] in capsys.readouterr().out
    metadata = read_metadata(tmp_path / "deit")
    assert metadata["kind"] == "model"
    assert metadata["architecture"]["name"] == "deit_tiny_patch16_224"
    assert metadata["architecture"]["preprocessing"]["image_size"] == 224
    assert (metadata["source"], metadata["sha256"]) == (str(raw), sha256)
    imported, direct = load_float_model(str(tmp_path / "deit")), load_float_model(str(raw))
    assert imported.architecture == direct.architecture
    assert_same_bits(imported.weights, direct.weights)
    folder = str(shared / "data" / "imagenet-sample")
    images = load_images(folder, direct.architecture.preprocessing, labels=False, limit=4, progress=False)
    x = images.normalize(0, 4)
    assert_same_bits(forward(imported.stages(), x), forward(direct.stages(), x))
