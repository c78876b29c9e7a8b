"""A search's state on disk: what did not change is not written again, and damage is found."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from cptv_jax import InputError
from cptv_jax.storage.search_states import load_search_state, remove_leftovers, save_search_state


def part(seed: int) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    return {"qkv": {"scale": rng.standard_normal((3, 1), np.float32)}, "zero": np.int32(seed), "on": np.array([True])}


def stamps(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in folder.glob("*.npz")}


def assert_same(found: Any, expected: Any) -> None:
    at, wanted = (jax.tree_util.tree_leaves_with_path(tree) for tree in (found, expected))
    assert [path for path, _ in at] == [path for path, _ in wanted]
    for (_, a), (_, b) in zip(at, wanted, strict=True):
        assert (a.dtype, np.shape(a), a.tobytes()) == (b.dtype, np.shape(b), b.tobytes())


def test_everything_comes_back_with_its_bits_types_shapes_and_order(tmp_path: Path) -> None:
    odd = {"z": np.array([np.nan, -0.0, 1e-45, np.inf], np.float32), "a/b.npy": {"": np.zeros((0, 2))}, "empty": {}}
    scales = {"blocks.1": part(1), "blocks.0": odd}
    parts: dict[str, dict[str, Any]] = {"scales": scales, "direction": {}, "progress": {"done": np.int32(3)}}
    save_search_state(tmp_path / "state", parts, {"loss": 0.1, "best": None, "log": [{"a": 1e-300}]})
    found = load_search_state(tmp_path / "state")
    assert found is not None
    assert_same(found[0], parts)
    assert list(found[0]["scales"]) == ["blocks.1", "blocks.0"]
    assert list(found[0]["scales"]["blocks.0"]) == ["z", "a/b.npy", "empty"]
    assert found[1] == {"loss": 0.1, "best": None, "log": [{"a": 1e-300}]}


def test_without_a_state_there_is_none(tmp_path: Path) -> None:
    assert load_search_state(tmp_path / "state") is None
    remove_leftovers(tmp_path / "state")


def test_only_the_parts_that_changed_are_written_and_the_old_ones_go(tmp_path: Path) -> None:
    scales = {f"blocks.{i}": part(i) for i in range(4)}
    save_search_state(tmp_path, {"scales": scales, "best_scales": scales}, {})
    first = stamps(tmp_path)
    assert len(first) == 4  # the best scales are the present ones
    changed = {**scales, "blocks.2": part(9)}
    save_search_state(tmp_path, {"scales": changed, "best_scales": scales}, {})
    second = stamps(tmp_path)
    assert len(second) == 5
    assert {name: second[name] for name in first} == first
    save_search_state(tmp_path, {"scales": changed, "best_scales": changed}, {})
    third = stamps(tmp_path)
    assert len(third) == 4
    assert {name: second[name] for name in third} == third
    found = load_search_state(tmp_path)
    assert found is not None
    assert_same(found[0], {"scales": changed, "best_scales": changed})


def test_parts_of_other_shapes_are_other_parts(tmp_path: Path) -> None:
    parts = {"scales": {"a": np.zeros(1), "b": np.zeros(()), "c": np.zeros((1, 1)), "d": {"x": np.zeros(1)}}}
    save_search_state(tmp_path, parts, {})
    found = load_search_state(tmp_path)
    assert found is not None
    assert_same(found[0], parts)


def test_what_an_interruption_left_is_removed(tmp_path: Path) -> None:
    save_search_state(tmp_path, {"scales": {"a": part(0)}}, {})
    before = sorted(path.name for path in tmp_path.iterdir())
    (tmp_path / ".abc.npz.tmp").write_bytes(b"half")
    (tmp_path / "abc.npz").write_bytes(b"never named")
    remove_leftovers(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == before


@pytest.mark.parametrize("damage", ["remove", "truncate", "flip", "empty"])
def test_a_damaged_part_is_refused_with_the_remedy(tmp_path: Path, damage: str) -> None:
    folder = tmp_path / "state"
    save_search_state(folder, {"scales": {"a": part(0)}}, {})
    (file,) = folder.glob("*.npz")
    content = file.read_bytes()
    if damage == "remove":
        file.unlink()
    else:
        middle = len(content) // 2
        flipped = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
        file.write_bytes({"truncate": content[:middle], "flip": flipped, "empty": b""}[damage])
    says = r"npz is (missing|damaged); remove .*state, and the same command begins the search again"
    with pytest.raises(InputError, match=says):
        load_search_state(folder)


def test_an_array_that_is_not_what_its_name_says_is_refused(tmp_path: Path) -> None:
    save_search_state(tmp_path, {"scales": {"a": part(0)}}, {})
    (file,) = tmp_path.glob("*.npz")
    other: dict[str, Any] = {"0": np.ones(3), "1": np.int32(0), "2": np.array([True])}
    np.savez(file, **other)  # a whole file, with a checksum
    with pytest.raises(InputError, match="is damaged"):
        load_search_state(tmp_path)


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"parts": 1, "described": {}}'])
def test_a_damaged_index_is_refused_with_the_remedy(tmp_path: Path, content: str) -> None:
    (tmp_path / "state.json").write_text(content)
    with pytest.raises(InputError, match=r"state.json is damaged; remove "):
        load_search_state(tmp_path)


@pytest.mark.parametrize("leaf", [None, "text", np.array([object()]), jax.numpy.zeros(2, jax.numpy.bfloat16)])
def test_what_cannot_be_kept_exactly_is_not_saved(tmp_path: Path, leaf: Any) -> None:
    with pytest.raises(TypeError, match="saved states hold numbers"):
        save_search_state(tmp_path, {"scales": {"a": leaf}}, {})
    with pytest.raises(TypeError, match="keys of saved dictionaries are strings"):
        save_search_state(tmp_path, {"scales": {"a": {0: np.zeros(1)}}}, {})


def test_a_disk_that_fills_up_leaves_the_state_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_search_state(tmp_path, {"scales": {"a": part(0)}}, {"loss": 1.0})
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(np, "savez", full)
        with pytest.raises(OSError, match="No space left"):
            save_search_state(tmp_path, {"scales": {"a": part(1)}}, {"loss": 0.5})
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
