"""The directory of a run: what it holds, and whom it lets in."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import filelock
import jax.numpy as jnp
import numpy as np
import pytest
import yaml

from cptv_jax import InputError, load_config
from cptv_jax.search.state import SearchState
from cptv_jax.storage.files import digest, lock, versions
from cptv_jax.storage.run_directory import RunDirectory
from cptv_jax.storage.run_file import RUN_FORMAT

IDENTITY: dict[str, Any] = {
    "config": {"seed": 0, "search": {"sites": ("a", "b"), "step": None}},
    "architecture": "tiny_vit",
    "weights": "12",
    "images": "34",
}


def state(position: int) -> SearchState:
    scales = {
        "blocks.0": {"attn.qkv.weight": np.array([0.1, 1e-30], np.float32) * position},
        "blocks.1": {"fc": jnp.ones(())},
    }
    log = tuple({"event": "accepted", "loss": 0.1 * i, "held_out": None} for i in range(position + 1))
    return SearchState(scales, 0, position, loss=0.1 + position, evaluations=3 * position, best_scales=scales, log=log)


def log_of(run: RunDirectory) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run.path / "log.jsonl").read_text().splitlines()]


def changed(**changes: Any) -> dict[str, Any]:
    return {**IDENTITY, **changes}


def test_a_new_run_says_what_it_is(tmp_path: Path) -> None:
    RunDirectory(tmp_path / "deep" / "run", IDENTITY)
    run = json.loads((tmp_path / "deep" / "run" / "run.json").read_text())
    assert run["identity"] == json.loads(json.dumps(IDENTITY))
    assert run["versions"] == versions()
    assert {"python", "jax", "jaxlib", "cptv-jax"} <= set(versions())
    assert yaml.safe_load((tmp_path / "deep" / "run" / "config.yaml").read_text())["search"]["sites"] == ["a", "b"]


def test_an_empty_folder_and_hidden_files_are_no_obstacle(tmp_path: Path) -> None:
    (tmp_path / ".DS_Store").touch()
    run = RunDirectory(tmp_path, IDENTITY)
    assert run.base() is run.final() is run.state() is None
    assert run.results() == {}
    RunDirectory(tmp_path, IDENTITY)


@pytest.mark.parametrize(
    ("other", "says"),
    [
        (changed(config={"seed": 1, "search": {"sites": ("a", "b"), "step": None}}), "(seed: 0 there, 1 here)"),
        (changed(config={"seed": 0, "search": {"sites": ("a",), "step": None}}), "(search.sites: ['a', 'b'] there"),
        (changed(config={"seed": 0, "search": {"sites": ("a", "b"), "step": 1.0}}), "(search.step: None there, 1.0"),
        (changed(architecture="other"), "(architecture: tiny_vit there, other here)"),
        (changed(weights="0"), "(weights: 12 there, 0 here)"),
        (changed(images="0"), "(images: 34 there, 0 here)"),
    ],
)
def test_a_run_with_another_identity_is_refused_by_the_difference(
    tmp_path: Path, other: dict[str, Any], says: str
) -> None:
    RunDirectory(tmp_path / "run", IDENTITY)
    before = {path: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    with pytest.raises(InputError) as caught:
        RunDirectory(tmp_path / "run", other)
    assert says in str(caught.value)
    assert {path: path.read_bytes() for path in (tmp_path / "run").iterdir()} == before


HOLD = """
import sys, time
from pathlib import Path
from cptv_jax.storage.files import lock
with lock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


def test_one_process_at_a_time_holds_a_run_and_a_killed_one_holds_nothing(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "run"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    with subprocess.Popen([sys.executable, "-c", HOLD, str(out)], env=environment, stdout=subprocess.PIPE) as holder:
        try:
            assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
            says = r"another process is working in .*run; wait for it or end it, or choose another --out"
            with pytest.raises(InputError, match=says), lock(out):
                pass
        finally:
            holder.kill()
    for _ in range(2):  # after the kill, and after an orderly end
        with lock(out):
            RunDirectory(out, IDENTITY)


def test_claiming_refuses_foreign_content_and_leaves_nothing_there(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "photo").touch()
    for name, says in (("file", "is a file; choose a directory"), ("folder", "is not empty and not a run")):
        with pytest.raises(InputError, match=says), lock(tmp_path / name):
            pass
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["photo"]


def test_a_file_system_without_locks_is_no_obstacle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def unsupported(*args: Any, **kwargs: Any) -> bool:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(filelock, "lock_descriptor", unsupported)
    with lock(tmp_path / "run"):
        assert "without locks" in caplog.text


def test_another_error_of_a_lock_is_not_taken_for_a_missing_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: Any, **kwargs: Any) -> bool:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(filelock, "lock_descriptor", broken)
    with pytest.raises(OSError, match="Input/output error"), lock(tmp_path / "run"):
        pass


def test_a_state_comes_back_whole(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path, IDENTITY)
    for position in range(3):
        run.save_state(state(position))
        found = RunDirectory(tmp_path, IDENTITY).state()
        assert found is not None
        for name in ("pass_index", "position", "loss", "evaluations", "best_pass", "best_held_out", "log"):
            assert getattr(found, name) == getattr(state(position), name)
        for scales in (found.scales, found.best_scales):
            wanted = np.asarray(state(position).scales["blocks.0"]["attn.qkv.weight"])
            assert scales["blocks.0"]["attn.qkv.weight"].tobytes() == wanted.tobytes()
            assert np.shape(scales["blocks.1"]["fc"]) == ()
        assert log_of(run) == list(state(position).log)


def test_the_log_is_never_behind_the_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = RunDirectory(tmp_path, IDENTITY)
    run.save_state(state(0))
    before = sorted(path.name for path in (tmp_path / "state").iterdir())
    replace = os.replace

    def fail_for_log(old: Path, new: Path) -> None:
        if new.name == "log.jsonl":
            raise OSError("interrupted")
        replace(old, new)

    def fail(path: Path, missing_ok: bool = False) -> None:
        raise OSError("interrupted")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fail_for_log)
        with pytest.raises(OSError, match="interrupted"):
            run.save_state(state(1))
    found = RunDirectory(tmp_path, IDENTITY).state()
    assert found is not None
    assert log_of(run) == list(found.log) == list(state(0).log)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", fail)  # as the older part is dropped
        with pytest.raises(OSError, match="interrupted"):
            run.save_state(state(1))
    assert len(list((tmp_path / "state").iterdir())) == len(before) + 1
    again = RunDirectory(tmp_path, IDENTITY)
    found = again.state()
    assert found is not None
    assert log_of(again) == list(found.log) == list(state(1).log)
    assert len(list((tmp_path / "state").iterdir())) == len(before)  # the older part is dropped on opening


def test_results_come_back(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path, IDENTITY)
    run.save_results({"float": {"top1": 100 / 3}})
    assert RunDirectory(tmp_path, IDENTITY).results() == {"float": {"top1": 100 / 3}}
    (tmp_path / "results.json").write_text("[1")
    with pytest.raises(InputError, match=r"results.json is damaged; remove it, and the same command measures again"):
        run.results()


@pytest.mark.parametrize("content", ["", "{", "[]", "3", "{}"])
def test_a_damaged_run_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(InputError, match=r"run.json is damaged; choose another --out"):
        RunDirectory(tmp_path, IDENTITY)
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]


def older(known: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in known.items() if name != "format"}


@pytest.mark.parametrize("change", [older, lambda known: {**known, "format": RUN_FORMAT + 1}], ids=["older", "newer"])
def test_a_run_of_another_format_is_refused_and_its_configuration_too(tmp_path: Path, change: Any) -> None:
    RunDirectory(tmp_path, IDENTITY)
    known = change(json.loads((tmp_path / "run.json").read_text()))
    (tmp_path / "run.json").write_text(json.dumps(known))
    number = known.get("format", 1)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    says = f"run.json has run format {number}, but this cptv reads {RUN_FORMAT}; choose another --out"
    with pytest.raises(InputError, match=says):
        RunDirectory(tmp_path, IDENTITY)
    with pytest.raises(InputError, match=f"config.yaml belongs to a run of format {number}"):
        load_config(str(tmp_path / "config.yaml"))
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_an_out_that_is_not_utf_8_is_refused_and_shown(tmp_path: Path) -> None:
    out = Path(os.fsdecode(os.fsencode(tmp_path) + b"/mod\xe8les"))
    with pytest.raises(InputError, match=r"mod\\udce8les is not valid UTF-8; rename it"), lock(out):
        pass
    assert list(tmp_path.iterdir()) == []


def test_the_digest_sees_bits_shapes_and_types() -> None:
    base = np.arange(6, dtype=np.float32)
    variants = [base, base.reshape(2, 3), base.astype(np.float64), -base, base.view(np.int32), np.append(base, 0)]
    assert len({digest(variant) for variant in variants}) == len(variants)
    assert digest(np.asfortranarray(base.reshape(2, 3))) == digest(base.reshape(2, 3))
    assert digest({"a": base, "b": jnp.ones(2)}) == digest({"b": np.ones(2, np.float32), "a": base})
    assert digest(np.float32(1)) != digest(np.ones(1, np.float32))
    assert digest({"a": np.float32(0.0)}) != digest({"a": np.float32(-0.0)})
