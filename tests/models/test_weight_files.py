"""Reading weights: every format that is accepted, and a plain sentence for everything that is not."""

import hashlib
import json
import struct
import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from cptv_jax.errors import InputError
from cptv_jax.models.weight_files import read_weights

WEIGHTS: dict[str, Any] = {  # arrays; any, as NumPy's savez(**WEIGHTS) takes a bool too
    "head.weight": np.arange(6, dtype=np.float32).reshape(2, 3) / 7,
    "head.bias": np.array([0.5, -0.25], np.float32),
}
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def assert_same(tensors: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert tensors.keys() == expected.keys()
    for key, value in expected.items():
        assert tensors[key].dtype == np.float32
        assert tensors[key].flags.c_contiguous
        np.testing.assert_array_equal(tensors[key], value)


def refusal(source: Path | str) -> str:
    """The message with which a source is refused: one sentence that names the source."""
    with pytest.raises(InputError) as caught:
        read_weights(str(source))
    message = str(caught.value)
    assert str(source) in message
    assert "\n" not in message
    return message


def write_raw_safetensors(path: Path, dtype: str, data: bytes) -> None:
    """One tensor "x" of any dtype, also of those that NumPy cannot write."""
    header = json.dumps({"x": {"dtype": dtype, "shape": [2], "data_offsets": [0, len(data)]}}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + data)


# What is read


def test_safetensors_are_read_with_their_path_and_hash(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    save_file(WEIGHTS, path)
    weights = read_weights(str(path))
    assert_same(weights.tensors, WEIGHTS)
    assert weights.source == str(path)
    assert weights.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_npz_is_read(tmp_path: Path) -> None:
    path = tmp_path / "w.NPZ"  # the extension in any case; through a file, as numpy.savez would append its own
    with path.open("wb") as file:
        np.savez_compressed(file, **WEIGHTS)
    assert_same(read_weights(str(path)).tensors, WEIGHTS)


def test_every_float_type_becomes_float32_value_for_value(tmp_path: Path) -> None:
    values = np.array([1.5, -2.25], np.float32)
    path = tmp_path / "w.safetensors"
    write_raw_safetensors(path, "BF16", values.astype(ml_dtypes.bfloat16).tobytes())
    assert_same(read_weights(str(path)).tensors, {"x": values})
    for dtype in (np.float16, np.float64):
        save_file({"x": values.astype(dtype)}, path)
        assert_same(read_weights(str(path)).tensors, {"x": values})
    np.savez(tmp_path / "w.npz", x=values.astype(">f8"), fortran=np.asfortranarray(WEIGHTS["head.weight"]))
    assert_same(read_weights(str(tmp_path / "w.npz")).tensors, {"x": values, "fortran": WEIGHTS["head.weight"]})


def test_scalars_and_empty_tensors_keep_their_shapes(tmp_path: Path) -> None:
    np.savez(tmp_path / "w.npz", scalar=np.float32(3), empty=np.zeros((0, 4), np.float32))
    tensors = read_weights(str(tmp_path / "w.npz")).tensors
    assert tensors["scalar"].shape == ()
    assert tensors["empty"].shape == (0, 4)


def test_the_real_deit_tiny_is_read_whole(shared: Path) -> None:
    weights = read_weights(str(shared / "weights" / "deit_tiny_patch16_224.safetensors"))
    assert len(weights.tensors) == 152
    assert sum(tensor.size for tensor in weights.tensors.values()) == 5_717_416
    assert weights.tensors["blocks.11.attn.qkv.weight"].shape == (576, 192)


# What is refused


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    assert "does not exist" in refusal(tmp_path / "absent.safetensors")
    assert "does not exist" in refusal(tmp_path / "absent.onnx")  # before its extension is judged


def test_a_folder_is_refused(tmp_path: Path) -> None:
    assert "is a folder" in refusal(tmp_path)


def test_an_unknown_extension_is_refused_with_the_known_ones(tmp_path: Path) -> None:
    (tmp_path / "w.onnx").write_bytes(b"x")
    assert ".safetensors, .npz, .pth, .pt, .bin" in refusal(tmp_path / "w.onnx")


@pytest.mark.parametrize("name", ["w.safetensors", "w.npz", "w.pth"])
def test_an_empty_file_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).touch()
    assert "is empty" in refusal(tmp_path / name)


@pytest.mark.parametrize("name", ["w.safetensors", "w.npz"])
def test_a_file_of_another_kind_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("<!DOCTYPE html> not what you wanted to download")
    assert "is not a readable" in refusal(tmp_path / name)


@pytest.mark.parametrize("name", ["w.safetensors", "w.npz"])
def test_a_truncated_file_is_refused_wherever_it_ends(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if path.suffix == ".npz":
        np.savez(path, **WEIGHTS)
    else:
        save_file(WEIGHTS, path)
    whole = path.read_bytes()
    for length in range(1, len(whole), 7):
        path.write_bytes(whole[:length])
        assert "download or export it again" in refusal(path)


def test_a_flipped_bit_in_an_npz_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "w.npz"
    np.savez(path, x=np.arange(100, dtype=np.float32))
    damaged = bytearray(path.read_bytes())
    damaged[300] ^= 1  # within the values
    path.write_bytes(damaged)
    assert "is not a readable .npz" in refusal(path)


def test_a_lone_npy_array_is_refused(tmp_path: Path) -> None:
    with (tmp_path / "w.npz").open("wb") as file:
        np.save(file, np.ones(2, np.float32))
    assert "single array" in refusal(tmp_path / "w.npz")


class Bomb:
    """Unpickling it writes a file: the witness that something was unpickled."""

    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.witness,)


def test_object_arrays_are_refused_and_never_unpickled(tmp_path: Path) -> None:
    witness = tmp_path / "unpickled"
    np.savez(tmp_path / "w.npz", fine=np.ones(2), bomb=np.array([Bomb(witness)], dtype=object))
    message = refusal(tmp_path / "w.npz")
    assert "'bomb'" in message
    assert "Object arrays" in message
    assert not witness.exists()


def test_a_pickle_named_npz_is_never_unpickled(tmp_path: Path) -> None:
    import pickle

    witness = tmp_path / "unpickled"
    (tmp_path / "w.npz").write_bytes(pickle.dumps(Bomb(witness)))
    refusal(tmp_path / "w.npz")
    assert not witness.exists()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_refused_by_key(tmp_path: Path, value: float) -> None:
    broken = {**WEIGHTS, "head.bias": np.array([0, value], np.float32)}
    save_file(broken, tmp_path / "w.safetensors")
    message = refusal(tmp_path / "w.safetensors")
    assert "'head.bias' holds 1 values" in message


def test_a_float64_beyond_float32_is_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "w.npz", x=np.array([1e300]))
    assert "'x' holds 1 values" in refusal(tmp_path / "w.npz")


@pytest.mark.parametrize("extension", ["safetensors", "npz", "pth"])
def test_counters_of_batch_norms_are_left_out_and_nothing_else_is(tmp_path: Path, extension: str) -> None:
    path = tmp_path / f"w.{extension}"

    def write(key: str, value: np.ndarray) -> None:
        tensors = {**WEIGHTS, key: value}
        if extension == "npz":
            np.savez(path, **tensors)
        elif extension == "safetensors":
            save_file(tensors, path)
        else:
            torch = pytest.importorskip("torch")
            torch.save({key: torch.from_numpy(np.array(tensor)) for key, tensor in tensors.items()}, path)

    write("stem.bn.num_batches_tracked", np.array(7, np.int64))
    assert_same(read_weights(str(path)).tensors, WEIGHTS)
    for key, value in (
        ("stem.bn.num_batches_tracked_too", np.array(7, np.int64)),
        ("stem.bn.num_batches_tracked", np.array([7], np.int64)),
        ("stem.bn.num_batches_tracked", np.array(7, np.int32)),
        ("stem.num_batches", np.array(7, np.int64)),
    ):
        write(key, value)
        assert repr(key) in refusal(path)


@pytest.mark.parametrize("dtype", ["int64", "uint8", "bool", "complex64"])
def test_tensors_that_are_not_floating_point_are_refused_by_key_and_type(tmp_path: Path, dtype: str) -> None:
    np.savez(tmp_path / "w.npz", **{**WEIGHTS, "bn.num_batches_tracked": np.ones(2, dtype)})
    message = refusal(tmp_path / "w.npz")
    assert "'bn.num_batches_tracked'" in message
    assert dtype in message


@pytest.mark.parametrize(("dtype", "size"), [("I64", 8), ("F8_E4M3", 1)])
def test_safetensors_types_that_are_not_plain_floats_are_refused(tmp_path: Path, dtype: str, size: int) -> None:
    write_raw_safetensors(tmp_path / "w.safetensors", dtype, bytes(2 * size))
    message = refusal(tmp_path / "w.safetensors")
    assert f"'x' is {dtype}" in message


def test_a_file_without_tensors_is_refused(tmp_path: Path) -> None:
    save_file({}, tmp_path / "w.safetensors")
    assert "holds no tensors" in refusal(tmp_path / "w.safetensors")


@pytest.mark.parametrize("extension", [".pth", ".pt", ".bin"])
def test_torch_files_without_torch_name_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, extension: str
) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    path = tmp_path / f"w{extension}"
    path.write_bytes(b"x")
    assert "cptv-jax[torch]" in refusal(path)


# Torch files


@pytest.mark.parametrize("name", [None, "model", "state_dict"])
def test_torch_state_dicts_are_read_plain_or_nested(tmp_path: Path, name: str | None) -> None:
    torch = pytest.importorskip("torch")
    state = {key: torch.from_numpy(value) for key, value in WEIGHTS.items()}
    path = tmp_path / "w.pth"
    torch.save(state if name is None else {name: state, "epoch": 3}, path)
    weights = read_weights(str(path))
    assert_same(weights.tensors, WEIGHTS)
    assert weights.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_torch_float_types_and_views_become_contiguous_float32(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    values = torch.tensor([[1.5, -2.25], [0.5, 4.0]])
    state = {str(dtype): values.to(dtype) for dtype in (torch.float16, torch.bfloat16, torch.float64)}
    state["parameter"] = torch.nn.Parameter(values)
    state["view"] = values.T
    torch.save(state, tmp_path / "w.pt")
    expected = {key: values.numpy() for key in state} | {"view": values.numpy().T}
    assert_same(read_weights(str(tmp_path / "w.pt")).tensors, expected)


def test_a_pickle_of_more_than_tensors_is_refused_and_never_unpickled(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    witness = tmp_path / "unpickled"
    torch.save({"model": {"x": torch.ones(2)}, "args": Bomb(witness)}, tmp_path / "w.pth")
    assert "never unpickled" in refusal(tmp_path / "w.pth")
    assert not witness.exists()


def test_a_damaged_torch_file_is_refused(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    path = tmp_path / "w.pth"
    torch.save({"x": torch.ones(100)}, path)
    whole = path.read_bytes()
    for content in (b"<!DOCTYPE html>", whole[: len(whole) // 2], whole[:-1]):
        path.write_bytes(content)
        assert "is damaged" in refusal(path)


def test_torch_entries_that_are_not_float_tensors_are_refused_by_key(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    path = tmp_path / "w.pth"
    for entry, words in [
        (torch.ones(2, dtype=torch.int64), "torch.int64"),
        (torch.ones(2).to_sparse(), "torch.sparse_coo"),
        ({"y": torch.ones(2)}, "not a tensor"),
    ]:
        torch.save({"x": entry}, path)
        message = refusal(path)
        assert "'x'" in message
        assert words in message
    torch.save([torch.ones(2)], path)
    assert "holds a list" in refusal(path)
    torch.save({"x": torch.tensor([1.0, float("nan")])}, path)
    assert "'x' holds 1 values" in refusal(path)


# The hub, offline, with a cache laid out as huggingface_hub lays it out


@pytest.fixture
def snapshot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cached snapshot folder of org/name at "main", empty; the hub is offline."""
    from huggingface_hub import constants

    # The library reads HF_HUB_OFFLINE and HF_HUB_CACHE when it is imported, which may have been long ago.
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--org--name"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    folder = repository / "snapshots" / COMMIT
    folder.mkdir(parents=True)
    return folder


@pytest.mark.parametrize("source", ["hub:org/name", "hf:org/name", "hub:org/name@main"])
def test_hub_ids_are_read_from_the_cache(snapshot: Path, source: str) -> None:
    save_file(WEIGHTS, snapshot / "model.safetensors")
    weights = read_weights(source)
    assert_same(weights.tensors, WEIGHTS)
    assert weights.source == "hub:org/name@main/model.safetensors"
    assert weights.sha256 == hashlib.sha256((snapshot / "model.safetensors").read_bytes()).hexdigest()


def test_a_hub_id_with_a_revision_is_read_at_that_revision(snapshot: Path) -> None:
    save_file(WEIGHTS, snapshot / "model.safetensors")
    other = snapshot.parent / COMMIT[::-1]
    other.mkdir()
    (snapshot.parent.parent / "refs" / "v2").write_text(other.name)
    newer = {"head.weight": WEIGHTS["head.weight"] + 1}
    save_file(newer, other / "model.safetensors")
    for revision in ("v2", other.name):
        weights = read_weights(f"hub:org/name@{revision}")
        assert_same(weights.tensors, newer)
        assert weights.source == f"hub:org/name@{revision}/model.safetensors"


def test_the_hub_falls_back_to_the_torch_file(snapshot: Path) -> None:
    torch = pytest.importorskip("torch")
    torch.save({key: torch.from_numpy(value) for key, value in WEIGHTS.items()}, snapshot / "pytorch_model.bin")
    weights = read_weights("hub:org/name")
    assert_same(weights.tensors, WEIGHTS)
    assert weights.source == "hub:org/name@main/pytorch_model.bin"


def test_without_torch_the_torch_file_of_the_hub_is_not_looked_for(
    snapshot: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    (snapshot / "pytorch_model.bin").write_bytes(b"x")
    message = refusal("hub:org/name")
    assert "no model.safetensors could be had" in message
    assert "where torch is installed" in message


@pytest.mark.parametrize("source", ["hub:org/absent", "hub:org/name@v2", "hub:org--x/name"])
def test_what_the_hub_does_not_have_is_refused(snapshot: Path, source: str) -> None:
    message = refusal(source)
    assert "could be had" in message
    assert "give its path" in message


@pytest.mark.parametrize("source", ["hub:", "hf:name", "hub:org/name@", "hub:org/name/file", "hub:org/na me"])
def test_what_is_not_a_hub_id_is_refused_with_the_form(source: str) -> None:
    assert "hub:org/name@revision" in refusal(source)


def test_a_damaged_file_of_the_hub_is_named_by_its_id(snapshot: Path) -> None:
    (snapshot / "model.safetensors").write_bytes(b"x")
    assert "hub:org/name@main/model.safetensors is not a readable" in refusal("hub:org/name")
