"""Inputs to the command line: sound ones, and ones with something wrong in each."""

import json
import pickle
import shlex
import shutil
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file
from tiny_vit import TINY

from cptv_jax import Model, save_model
from cptv_jax.cli.main import main
from cptv_jax.models.timm_weights import key_table
from cptv_jax.models.zoo import ZOO

SMALL = "--calibration.images 8 --calibration.batch 8 --search.strategy none"


class World:
    """Inputs that all cases share, each made when first asked for and never changed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @cached_property
    def tiny(self) -> Path:
        save_model(self.folder / "tiny", Model(TINY, TINY.initialize(0)))
        return self.folder / "tiny"

    @cached_property
    def photos(self) -> Path:
        return paint(self.folder / "photos", [f"{i}.png" for i in range(8)])

    @cached_property
    def beyond(self) -> Path:
        return paint(self.folder / "beyond", ["3/0.png", "10/0.png"])

    @cached_property
    def empty(self) -> Path:
        (self.folder / "empty").mkdir()
        return self.folder / "empty"

    @cached_property
    def run(self) -> Path:
        """A finished run."""
        command = f"quantize {self.tiny} --images {self.photos} --out {self.folder / 'run'} {SMALL}"
        assert exit_code(shlex.split(command)) == 0
        return self.folder / "run"

    def timm(self, name: str, change: Callable[[dict[str, np.ndarray]], object] = lambda tensors: None) -> Path:
        """A file with the tensors of DeiT-Tiny, changed."""
        tensors = {entry.key: np.zeros(entry.shape, np.float32) for entry in key_table(ZOO["deit_tiny_patch16_224"])}
        change(tensors)
        path = self.folder / name
        if not path.exists():
            path.parent.mkdir(exist_ok=True)
            save_file(tensors, path)
        return path

    @cached_property
    def deit(self) -> Path:
        return self.timm("deit_tiny_patch16_224.safetensors")


class Inputs(dict[str, object]):
    """The bad inputs of one case, in its own folder, made when the command line names them."""

    def __init__(self, world: World, folder: Path) -> None:
        self.world, self.folder = world, folder

    def __missing__(self, name: str) -> object:
        return getattr(self, name, None) or getattr(self.world, name)

    def write(self, name: str, content: bytes | str) -> Path:
        path = self.folder / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    @property
    def out(self) -> Path:
        return self.folder / "out"

    @property
    def absent(self) -> Path:
        return self.folder / "absent.safetensors"

    # Weight files

    @property
    def onnx(self) -> Path:
        return self.write("w.onnx", b"x")

    @property
    def zero_bytes(self) -> Path:
        return self.write("w.safetensors", b"")

    @property
    def text(self) -> Path:
        return self.write("w.safetensors", "<!DOCTYPE html> not what you wanted to download")

    @property
    def nameless(self) -> Path:
        save_file({"x": np.ones(3, np.float32)}, self.folder / "w.safetensors")
        return self.folder / "w.safetensors"

    @property
    def truncated(self) -> Path:
        return self.write("w.safetensors", self.nameless.read_bytes()[:-1])

    @property
    def pickled(self) -> Path:
        return self.write("w.npz", pickle.dumps({"x": np.ones(3)}))

    @property
    def objects(self) -> Path:
        np.savez(self.folder / "w.npz", bomb=np.array([{}], dtype=object))
        return self.folder / "w.npz"

    @property
    def nan(self) -> Path:
        save_file({"head.bias": np.array([0, np.nan], np.float32)}, self.folder / "deit_tiny_patch16_224.safetensors")
        return self.folder / "deit_tiny_patch16_224.safetensors"

    @property
    def lacking(self) -> Path:
        return self.world.timm("lacking/deit_tiny_patch16_224.safetensors", lambda tensors: tensors.pop("norm.bias"))

    @property
    def extra(self) -> Path:
        more = {"head_dist.bias": np.zeros(1000, np.float32)}
        return self.world.timm("extra/deit_tiny_patch16_224.safetensors", lambda tensors: tensors.update(more))

    @property
    def misshapen(self) -> Path:
        other = {"head.bias": np.zeros(10, np.float32)}
        return self.world.timm("misshapen/deit_tiny_patch16_224.safetensors", lambda tensors: tensors.update(other))

    # Checkpoints and runs

    def copied(self, original: Path) -> Path:
        return Path(shutil.copytree(original, self.folder / "copy"))

    def described(self, original: Path, change: Callable[[dict[str, Any]], object]) -> Path:
        """A checkpoint whose description is changed."""
        copy = self.copied(original)
        metadata = json.loads((copy / "metadata.json").read_text())
        change(metadata)
        (copy / "metadata.json").write_text(json.dumps(metadata))
        return copy

    @property
    def arrayless(self) -> Path:
        copy = self.copied(self.world.tiny)
        shutil.rmtree(copy / "arrays")
        return copy

    @property
    def flipped(self) -> Path:
        copy = self.copied(self.world.tiny)
        largest = max((copy / "arrays").rglob("*"), key=lambda path: path.stat().st_size * path.is_file())
        content = bytearray(largest.read_bytes())
        content[len(content) // 2] ^= 1
        largest.write_bytes(content)
        return copy

    @property
    def garbage(self) -> Path:
        copy = self.copied(self.world.tiny)
        (copy / "metadata.json").write_text('{"format": "cptv-jax che')
        return copy

    @property
    def foreign(self) -> Path:
        return self.described(self.world.tiny, lambda metadata: metadata.update(format="other"))

    @property
    def treeless(self) -> Path:
        return self.described(self.world.tiny, lambda metadata: metadata.pop("tree"))

    @property
    def newer(self) -> Path:
        return self.described(self.world.tiny, lambda metadata: metadata.update(version=2))

    @property
    def odd_sizes(self) -> Path:
        return self.described(self.world.tiny, lambda metadata: metadata["architecture"]["config"].update(rotary=True))

    @property
    def other_sizes(self) -> Path:
        return self.described(self.world.tiny, lambda metadata: metadata["architecture"]["config"].update(width=32))

    @property
    def odd_quantizer(self) -> Path:
        def change(metadata: dict) -> None:
            metadata["quantizers"]["head.fc"]["kind"] = "Ternary"

        return self.described(self.world.run / "model", change)

    @property
    def unfinished(self) -> Path:
        copy = self.copied(self.world.run)
        shutil.rmtree(copy / "model")
        (copy / "report.md").unlink()
        return copy

    @property
    def run_damaged(self) -> Path:
        copy = self.copied(self.world.run)
        (copy / "run.json").write_text("[]")
        return copy

    @property
    def results_damaged(self) -> Path:
        copy = self.copied(self.world.run)
        (copy / "results.json").write_text("{")
        return copy

    # Images

    @property
    def mixed(self) -> Path:
        return paint(self.folder / "mixed", ["0.png", "1/0.png"])

    @property
    def corrupt(self) -> Path:
        folder = paint(self.folder / "corrupt", [f"{i}.jpg" for i in range(8)])
        (folder / "2.jpg").write_bytes((folder / "1.jpg").read_bytes()[:200])
        return folder

    # Configurations

    @property
    def bad_yaml(self) -> Path:
        return self.write("c.yaml", "search: {passes: 3")

    @property
    def list_yaml(self) -> Path:
        return self.write("c.yaml", "- search")

    @property
    def null_yaml(self) -> Path:
        return self.write("c.yaml", "search:\n")

    @property
    def typo_yaml(self) -> Path:
        return self.write("c.yaml", "search: {judge: {holdot: 0.2}}")

    @property
    def older_yaml(self) -> Path:
        return self.write("c.yaml", "search: {strategy: guided, gradient_steps: 3}")

    @property
    def twice_yaml(self) -> Path:
        return self.write("c.yaml", "seed: 1\nseed: 2\n")

    @property
    def type_yaml(self) -> Path:
        return self.write("c.yaml", "search: {strategy: {name: evol-q, passes: ten}}")


def paint(folder: Path, names: list[str]) -> Path:
    """Small photographs, each different."""
    for value, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(value).integers(0, 256, (32, 32, 3), np.uint8)
        Image.fromarray(pixels).save(folder / name)
    return folder


def exit_code(argv: list[str]) -> object:
    with pytest.raises(SystemExit) as ended:
        main(argv)
    return ended.value.code
