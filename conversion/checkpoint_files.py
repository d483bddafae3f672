"""Checkpoint files of many origins, read as a dictionary of tensors without running what they hold.

    model.pth           torch.save, zip or the older format    looked through, then torch.load(weights_only=True)
    model.pkl           model zoo, numpy arrays                read as data, see `pickle_data.py`
    model.safetensors                                          safetensors

Every file is looked through before memory is taken for it: what it announces must fit into what it is. Weights may stand in the
file as they are, or under `model` or `state_dict`.
"""

import errno
import pickle
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from conversion import ConversionError
from conversion.pickle_data import (
    BoundedFile,
    ForeignNameError,
    PickleDataError,
    StoredArray,
    StoredStorage,
    StoredTensor,
    read_pickle,
)

WRAPPERS = ("model", "state_dict")
ZIP_START = b"PK\x03\x04"
PICKLE_STARTS = (b"\x80", b"(", b"}", b"c")  # from protocol 2 on; the older ones begin with what they hold
LEGACY_TORCH_MAGIC = 0x1950A86A20F9469CFC6C
GIT_LFS_START = b"version https://git-lfs"
EXPECTED = "Expected weights in a `.pth`, `.pkl` or `.safetensors` file"


@dataclass(frozen=True)
class Checkpoint:
    """The weights of a file.

    Attributes:
        path: the file.
        tensors: name in the file -> tensor. Those of a `.pth` or a `.safetensors` are mapped from the file: read when used.
        notes: what else is worth saying about the file.
    """

    path: Path
    tensors: dict[str, Tensor]
    notes: list[str] = field(default_factory=list)

    @property
    def shapes(self) -> dict[str, torch.Size]:
        """Name -> shape."""
        return {name: tensor.shape for name, tensor in self.tensors.items()}


def read_checkpoint(path: str | Path, *, trust_pickle: bool = False) -> Checkpoint:
    """Read the weights of a file. No code of the file is run, and memory is bounded by its size.

    Args:
        path: of torch (zip or the older format), a pickle of numpy arrays, or safetensors; the ending of its name does not matter.
        trust_pickle: True loads a file that needs other classes with Python's own `pickle`, which runs whatever code it contains.

    Raises:
        ConversionError: there is no such file, or it does not hold weights; the message says what it holds instead.
    """
    path = Path(path)
    start = _read_start(path)
    with _explained(path):
        if start.startswith(ZIP_START):
            content: object = _load_torch(path, _check_zip, trust_pickle=trust_pickle)
        elif start.startswith(PICKLE_STARTS):
            content = _load_any_pickle(path, trust_pickle=trust_pickle)
        elif start[8:9] == b"{":
            content = _load_safetensors(path)
        else:
            raise ConversionError(f"{EXPECTED}, but `{path}` {_describe_start(start)}.")
        weights, notes = _unwrap(path, content)
        return Checkpoint(path, _to_tensors(path, weights), notes)


# ----------------------------------------------------------------------------------------------------------------- opening


def _read_start(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            start = file.read(512)
    except FileNotFoundError:
        raise ConversionError(f"{EXPECTED}, but there is no file `{path}`. Check the path.") from None
    except IsADirectoryError:
        raise ConversionError(f"{EXPECTED}, but `{path}` is a folder. Pass the file in it.") from None
    except OSError as error:
        reason = errno.errorcode.get(error.errno or 0, "error")
        raise ConversionError(f"{EXPECTED}, but `{path}` cannot be read: {error.strerror} ({reason}).") from error
    except ValueError as error:  # a zero byte in the name
        raise ConversionError(f"{EXPECTED}, but {str(path)!r} is not a path: {error}.") from error
    if not start:
        raise ConversionError(f"{EXPECTED}, but `{path}` is empty. Download it again.")
    return start


def _describe_start(start: bytes) -> str:
    if start.startswith(GIT_LFS_START):
        return "is a pointer of Git LFS, not the file itself. Run `git lfs pull`"
    if start.lstrip()[:1] == b"<":
        return "is a web page or XML. Download the file itself"
    return f"begins with {start[:8]!r}, which is none of them. It may be damaged; download it again"


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Turn errors of reading into one that names the file."""
    try:
        yield
    except ForeignNameError as error:
        raise ConversionError(
            f"`{path}` asks for `{error.name}`. Weights need numbers and plain containers only; reading more would run code of the "
            "file, so it was not read. If you trust where it comes from, `--trust-pickle` loads it with Python's own pickle, which "
            "runs whatever the file contains, with your rights."
        ) from error
    except PickleDataError as error:
        raise ConversionError(f"{EXPECTED}, but `{path}` {error}. Download it again.") from error


def _check_fits(path: Path, num_bytes: int, what: str) -> None:
    size = path.stat().st_size
    if num_bytes > size:
        raise ConversionError(
            f"`{path}` announces {what} of {num_bytes} bytes, but is a file of {size} bytes. It is damaged, or made to fill the memory."
        )


# ------------------------------------------------------------------------------------------------------------ files of torch


def _load_torch(path: Path, check: Callable[[Path], None], *, trust_pickle: bool) -> object:
    weights_only = True
    try:
        check(path)
    except ForeignNameError:
        if not trust_pickle:
            raise
        weights_only = False
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch, about its own older formats
            return torch.load(path, map_location="cpu", weights_only=weights_only, mmap=check is _check_zip)
    except Exception as error:
        reason = str(error).strip().splitlines()[:1] or [type(error).__name__]
        raise ConversionError(f"{EXPECTED}, but torch cannot load `{path}`: {reason[0][:300]}") from error


def _check_zip(path: Path) -> None:
    """Look through a zip of `torch.save`: its records are plain, and its tensors have the sizes of their records."""
    try:
        with zipfile.ZipFile(path) as archive:
            records = {entry.filename: entry for entry in archive.infolist()}
            main = _find_pickle(path, records)
            with archive.open(main) as file:
                content = read_pickle(BoundedFile(file, records[main].file_size), of_torch=True)
    except (ConversionError, PickleDataError):
        raise
    except Exception as error:  # zipfile raises many kinds
        raise ConversionError(f"{EXPECTED}, but `{path}` is a damaged zip ({error}). Download it again.") from error
    for storage in _check_stored_tensors(path, content):
        record = records.get(f"{main.removesuffix('data.pkl')}data/{storage.key}")
        if record is None or record.file_size != storage.num_bytes:
            found = "is missing" if record is None else f"has {record.file_size} bytes"
            raise ConversionError(
                f"`{path}` needs {storage.num_bytes} bytes in its record data/{storage.key}, which {found}. Download it again."
            )


def _find_pickle(path: Path, records: Mapping[str, zipfile.ZipInfo]) -> str:
    """Name of the record that describes the tensors."""
    _check_fits(path, sum(entry.file_size for entry in records.values()), "records")
    pickles = [name for name in records if name.endswith("data.pkl")]
    if len(pickles) != 1 or any(name.endswith("constants.pkl") for name in records):
        raise ConversionError(
            f"{EXPECTED}, but `{path}` is a zip of another kind ({', '.join(sorted(records)[:3])[:200]}), such as a TorchScript "
            "model. Save its `state_dict()` with `torch.save`."
        )
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in records.values()):
        raise ConversionError(f"{EXPECTED}, but `{path}` is a compressed zip. Save it with `torch.save`.")
    return pickles[0]


def _check_legacy(path: Path) -> None:
    """Look through a file of `torch.save` before torch 1.6: five pickles, then the storages."""
    with path.open("rb") as raw:
        file = BoundedFile(raw, path.stat().st_size)
        for _ in range(3):  # magic number, version, machine
            read_pickle(file, of_torch=True)
        content = read_pickle(file, of_torch=True)
        keys = read_pickle(file, of_torch=True)
        storages = _check_stored_tensors(path, content)
        needed = sum(storage.num_bytes + 8 for storage in storages)
        if not isinstance(keys, list) or needed > file.left:
            raise ConversionError(
                f"`{path}` announces storages of {needed} bytes, but {file.left} bytes are left of it. Download it again."
            )


def _check_stored_tensors(path: Path, content: object) -> set[StoredStorage]:
    """Check that all storages together are no larger than the file, and return them. Each tensor has been compared with its own."""
    storages: set[StoredStorage] = set()
    seen: set[int] = set()
    queue = [content]
    while queue:
        value = queue.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, dict):
            queue.extend(value.values())
        elif isinstance(value, list | tuple):
            queue.extend(value)
        elif isinstance(value, StoredTensor):
            storages.add(value.storage)
        elif isinstance(value, StoredStorage):
            storages.add(value)
    _check_fits(path, sum(storage.num_bytes for storage in storages), "storages")
    return storages


# ------------------------------------------------------------------------------------------------------------- other files


def _load_any_pickle(path: Path, *, trust_pickle: bool) -> object:
    """A pickle of arrays, or torch's older format, which begins with a pickled number."""
    try:
        with path.open("rb") as file:
            content = read_pickle(BoundedFile(file, path.stat().st_size))
    except ForeignNameError:
        if not trust_pickle:
            raise
        with path.open("rb") as file:
            return pickle.load(file, encoding="latin1")  # the caller has asked for it
    if content == LEGACY_TORCH_MAGIC:
        return _load_torch(path, _check_legacy, trust_pickle=trust_pickle)
    return content


def _load_safetensors(path: Path) -> object:
    try:
        return load_file(path)
    except (SafetensorError, ValueError, OSError) as error:
        reason = str(error)[:200]
        raise ConversionError(
            f"{EXPECTED}, but `{path}` is a damaged safetensors file ({reason}). Download it again."
        ) from error


# ---------------------------------------------------------------------------------------------------------------- content


def _unwrap(path: Path, content: object) -> tuple[Mapping[object, object], list[str]]:
    """Find the weights in what a file holds: itself, or under one of `WRAPPERS`."""
    notes: list[str] = []
    for _ in range(len(WRAPPERS)):
        wrapper = next(
            (w for w in WRAPPERS if isinstance(content, Mapping) and isinstance(content.get(w), Mapping)), None
        )
        if wrapper is None:
            break
        assert isinstance(content, Mapping)
        if isinstance(content.get("iteration"), int):
            notes.append(f"The checkpoint was saved after iteration {content['iteration']}.")
        others = sorted(str(key)[:40] for key in content if key not in {wrapper, "iteration"})
        if others:
            notes.append(f"Entries beside the weights are not used: {', '.join(others[:10])}.")
        content = content[wrapper]
    if not isinstance(content, Mapping):
        raise ConversionError(
            f"{EXPECTED}, but `{path}` holds a {type(content).__name__}, not a dictionary of tensors."
        )
    if not content:
        raise ConversionError(f"{EXPECTED}, but the dictionary in `{path}` is empty.")
    return content, notes


def _to_tensors(path: Path, weights: Mapping[object, object]) -> dict[str, Tensor]:
    arrays = [value for value in weights.values() if isinstance(value, StoredArray)]
    _check_fits(path, sum(array.num_bytes for array in arrays), "arrays")
    if len({id(array) for array in arrays}) != len(arrays):
        raise PickleDataError("uses one array for several weights")
    tensors: dict[str, Tensor] = {}
    for name, value in weights.items():
        if not isinstance(name, str):
            raise ConversionError(f"{EXPECTED}, but `{path}` has the name {str(name)[:40]!r}, which is not a string.")
        tensors[name] = _to_tensor(path, name, value)
    _check_fits(path, sum(tensor.nbytes for tensor in tensors.values()), "weights")
    return tensors


def _to_tensor(path: Path, name: str, value: object) -> Tensor:
    if isinstance(value, StoredArray):
        value = value.take()
    if isinstance(value, np.ndarray | np.generic):
        array = np.asarray(value)
        value = None if array.dtype == object else torch.from_numpy(array)
    if not isinstance(value, Tensor) or value.layout != torch.strided or value.is_quantized or value.is_complex():
        kind = type(value).__name__ if not isinstance(value, Tensor) else f"{value.layout} tensor of {value.dtype}"
        raise ConversionError(
            f"{EXPECTED}, but `{name[:80]}` in `{path}` is a {kind}, not an array of numbers. Remove what is no weight, or name the "
            "dictionary that holds the weights `model`."
        )
    return value.detach()
