"""Reads pretrained weights from files of several formats and from the Hugging Face hub."""

import hashlib
import importlib.util
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import safe_open

from cptv_jax.errors import InputError, one_line

_HUB_PREFIXES = ("hub:", "hf:")
_HUB_ID = re.compile(r"(?:hub|hf):(?P<repository>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w./-]+))?")
_COUNTER = ".num_batches_tracked"  # an integer that torch keeps with every batch norm; inference does not need it
_DOWNLOAD = "download or export it again"
_INSTALL_TORCH = "install torch (pip install 'cptv-jax[torch]') or convert the file to .safetensors"


@dataclass(frozen=True)
class WeightFile:
    """The tensors of one file of weights and their origin.

    Attributes:
        tensors: float32, contiguous, finite, with the file's own keys and shapes (timm's keys, torch's shapes).
        source: The path as given, or "hub:org/name@revision/file".
        sha256: Digest of the file's bytes, in hexadecimal.
    """

    tensors: dict[str, np.ndarray]
    source: str
    sha256: str


def read_weights(source: str) -> WeightFile:
    """Reads weights from a file or from the Hugging Face hub.

    float16, bfloat16 and float64 tensors become float32. Only torch's weights_only loader ever unpickles anything.
    Batch norm's counters of batches (int64 scalars named *.num_batches_tracked) are left out.

    Args:
        source: A .safetensors, .npz, .pth, .pt or .bin file, or "hub:org/name[@revision]" ("hf:" too).

    Returns:
        The tensors, where they came from, and the file's digest.

    Raises:
        InputError: For a file that is missing, damaged, of another kind or in need of a torch that is not installed,
            and for tensors that are not floating point or not finite.
    """
    if source.startswith(_HUB_PREFIXES):
        path, source = _download(source)
    else:
        path = Path(source)
    reader = _find_reader(path, source)
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()  # in pieces: the file need not fit in memory twice
    tensors = reader(path, source)
    if not tensors:
        raise InputError(f"{source} holds no tensors; give a file of pretrained weights")
    return WeightFile(tensors, source, sha256)


def _find_reader(path: Path, source: str) -> Callable[[Path, str], dict[str, np.ndarray]]:
    reader = _READERS.get(path.suffix.lower())
    if path.is_dir():
        raise InputError(f"{source} is a folder; give the file of weights inside it")
    if not path.is_file():
        raise InputError(f"{source} does not exist; give the path of a file of weights or a hub:org/name id")
    if reader is None:
        raise InputError(f"{source} has an unknown extension; weights are read from {', '.join(_READERS)} files")
    if path.stat().st_size == 0:
        raise InputError(f"{source} is empty; download or export it again")
    return reader


def _read_safetensors(path: Path, source: str) -> dict[str, np.ndarray]:
    tensors: dict[str, np.ndarray] = {}
    try:
        with safe_open(path, framework="np") as file:
            for key in file.keys():  # noqa: SIM118 - not a dict
                dtype = file.get_slice(key).get_dtype()
                if _is_counter(key, dtype == "I64", file.get_slice(key).get_shape()):
                    continue
                # Asked first: for a type that NumPy lacks (8-bit floats), get_tensor fails with an AttributeError.
                if dtype not in ("F16", "BF16", "F32", "F64"):
                    raise _dtype_error(source, key, dtype)
                tensors[key] = _to_float32(file.get_tensor(key), key, source)
    except InputError:
        raise
    except Exception as error:  # SafetensorError derives from nothing narrower
        raise _damage_error(source, "a readable safetensors file", error) from error
    return tensors


def read_npz_arrays(path: Path, source: str, remedy: str, array_remedy: str) -> Iterator[tuple[str, np.ndarray]]:
    """Reads the arrays of an .npz file one by one, never unpickling.

    Args:
        path: The file.
        source: The file's name in messages.
        remedy: The remedy in messages about the whole file.
        array_remedy: The remedy in messages about one array.

    Yields:
        An array's key and the array.

    Raises:
        InputError: For a damaged file, one that is not an archive, and an array that only unpickling could read.
    """
    try:
        # Opened here: given a path, numpy.load leaves a damaged archive open.
        with path.open("rb") as file:
            archive = np.load(file, allow_pickle=False)
            if not isinstance(archive, np.lib.npyio.NpzFile):
                raise InputError(f"{source} is a single array, not an .npz archive; {array_remedy}")
            for key in archive.files:
                yield key, _read_npz_member(archive, key, source, array_remedy)
    except InputError:
        raise
    except Exception as error:  # zipfile, zlib and numpy.load each have their own for a damaged archive
        raise InputError(f"{source} is not a readable .npz archive ({one_line(error)}); {remedy}") from error


def _read_npz_member(archive: Any, key: str, source: str, remedy: str) -> np.ndarray:
    try:
        member = archive[key]
    except ValueError as error:  # an object array, or a damaged header: NumPy's own words say which
        raise InputError(f"{source}: array {key!r} cannot be read ({one_line(error)}); {remedy}") from error
    if not isinstance(member, np.ndarray):  # NumPy hands out other files in the archive as bytes
        raise InputError(f"{source}: {key!r} is not an array; {remedy}")
    return member


def _read_npz(path: Path, source: str) -> dict[str, np.ndarray]:
    tensors: dict[str, np.ndarray] = {}
    for key, member in read_npz_arrays(
        path, source, _DOWNLOAD, "save it again as a plain float array with numpy.savez"
    ):
        if not _is_counter(key, member.dtype == np.int64, member.shape):
            tensors[key] = _to_float32(member, key, source)
    return tensors


def _read_torch(path: Path, source: str) -> dict[str, np.ndarray]:
    try:
        import torch
    except ImportError as error:
        raise InputError(f"{source} can be read only with torch; {_INSTALL_TORCH}") from error
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle can raise anything
        raise InputError(
            f"{source} is damaged or holds more than plain tensors, which is never unpickled; "
            "save the model's state dict again with safetensors or torch.save"
        ) from error
    tensors: dict[str, np.ndarray] = {}
    for key, tensor in _state_dict(content, source).items():
        if not isinstance(tensor, torch.Tensor):
            raise InputError(f"{source}: {key!r} is a {type(tensor).__name__}, not a tensor; save only the state dict")
        if _is_counter(str(key), tensor.dtype == torch.int64, tensor.shape):
            continue
        if tensor.layout != torch.strided or tensor.dtype not in _torch_floats(torch):
            kind = tensor.dtype if tensor.layout == torch.strided else tensor.layout
            raise _dtype_error(source, key, kind)
        # NumPy has no bfloat16 of its own, so torch converts.
        tensors[str(key)] = _to_float32(tensor.detach().to(torch.float32).numpy(), key, source)
    return tensors


def _torch_floats(torch: Any) -> tuple[Any, ...]:
    return (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def _state_dict(content: object, source: str) -> Mapping[str, object]:
    """Returns the mapping of keys to tensors in a checkpoint: the content itself, or the entry under a usual name.

    Raises:
        InputError: If the content is no mapping.
    """
    if isinstance(content, Mapping):
        for name in ("model", "state_dict"):
            if isinstance(content.get(name), Mapping):
                return content[name]
        return content
    raise InputError(f"{source} holds a {type(content).__name__}, not a state dict; save model.state_dict()")


def _download(source: str) -> tuple[Path, str]:
    """Downloads a hub id's weights, or finds them in the hub's cache.

    Returns:
        The local path, and the id completed by revision and file.

    Raises:
        InputError: For a malformed id, and for weights that cannot be had.
    """
    match = _HUB_ID.fullmatch(source)
    if match is None:
        raise InputError(f"{source} is not a hub id; write hub:org/name or hub:org/name@revision")
    # Imported here: it brings an HTTP client, which local files do not need.
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    repository, revision = match["repository"], match["revision"] or "main"
    files = ["model.safetensors"]
    remedy = "check the id and the network, or download the file and give its path"
    if importlib.util.find_spec("torch") is not None:
        files.append("pytorch_model.bin")
    else:
        remedy += "; a pytorch_model.bin is looked for only where torch is installed"
    reason: Exception | None = None
    for file in files:
        try:
            path = hf_hub_download(repository, file, revision=revision)
        except EntryNotFoundError as error:  # the repository lacks this file (offline: the cache does); try the next
            reason = error
        except Exception as error:  # the type of a network error depends on the hub library's HTTP client
            reason = error
            break
        else:
            return Path(path), f"hub:{repository}@{revision}/{file}"
    raise InputError(
        f"hub:{repository}@{revision}: no {' or '.join(files)} could be had ({type(reason).__name__}); {remedy}"
    ) from reason


def _is_counter(key: str, int64: bool, shape: Sequence[int]) -> bool:
    return key.endswith(_COUNTER) and int64 and len(shape) == 0


def _to_float32(array: np.ndarray, key: str, source: str) -> np.ndarray:
    if array.dtype.kind != "f" and array.dtype != ml_dtypes.bfloat16:
        raise _dtype_error(source, key, array.dtype)
    with np.errstate(over="ignore"):  # a float64 beyond float32's range becomes infinite and is reported below
        tensor = np.array(array, dtype=np.float32, order="C")  # a copy of its own, which no file mapping backs
    bad = tensor.size - np.count_nonzero(np.isfinite(tensor))
    if bad:
        raise InputError(
            f"{source}: tensor {key!r} holds {bad} values that are NaN or infinite in float32; "
            "export the weights again from an intact model"
        )
    return tensor


def _dtype_error(source: str, key: str, dtype: object) -> InputError:
    return InputError(
        f"{source}: tensor {key!r} is {dtype}, but weights must be float16, bfloat16, float32 or float64; "
        "remove it from the file or export the float model"
    )


def _damage_error(source: str, kind: str, error: Exception) -> InputError:
    return InputError(f"{source} is not {kind} ({error}); {_DOWNLOAD}")


_READERS: dict[str, Callable[[Path, str], dict[str, np.ndarray]]] = {
    ".safetensors": _read_safetensors,
    ".npz": _read_npz,
    ".pth": _read_torch,
    ".pt": _read_torch,
    ".bin": _read_torch,
}
