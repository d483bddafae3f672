"""Checkpoint files: every honest form is read, every other is refused with a message, and nothing of a file is ever run."""

import argparse
import io
import os
import pickle
import struct
import sys
import tracemalloc
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from conversion import ConversionError
from conversion.checkpoint_files import read_checkpoint

WEIGHTS = {
    "stem.weight": torch.arange(24, dtype=torch.float32).reshape(2, 3, 4) / 7,
    "norm.count": torch.tensor(12),
    "head.bias": torch.tensor([1.5, -2.0, float("inf")]),
    "half.weight": torch.tensor([[0.1, 0.2]], dtype=torch.float16),
    "flags": torch.tensor([True, False]),
}
MEBIBYTE = 2**20


def arrays() -> dict[str, np.ndarray]:
    return {name: tensor.numpy() for name, tensor in WEIGHTS.items()}


def pickled(content: object, protocol: int = 4) -> bytes:
    return pickle.dumps(content, protocol=protocol)


def saved(content: object, **options: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, **options)
    return buffer.getvalue()


def legacy(content: object) -> bytes:
    return saved(content, _use_new_zipfile_serialization=False)


def safetensors(folder: Path) -> bytes:
    save_file(WEIGHTS, folder / "saved")
    return (folder / "saved").read_bytes()


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name


def read_bytes(folder: Path, content: bytes, **options: object) -> dict[str, Tensor]:
    file = folder / "checkpoint"
    file.write_bytes(content)
    return read_checkpoint(file, **options).tensors


def refusal(folder: Path, content: bytes, **options: object) -> str:
    """The message with which a file is refused; it names the file."""
    with pytest.raises(ConversionError) as refused:
        read_bytes(folder, content, **options)
    message = str(refused.value)
    assert str(folder / "checkpoint") in message
    return message


# ---------------------------------------------------------------------------------------------------------- honest files

HONEST = {
    "zip of torch": lambda: saved({"model": OrderedDict(WEIGHTS), "iteration": 7, "optimizer": {"state": {0: {}}}}),
    "bare zip of torch": lambda: saved(WEIGHTS),
    "parameters": lambda: saved(
        {n: torch.nn.Parameter(t, requires_grad=t.is_floating_point()) for n, t in WEIGHTS.items()}
    ),
    "state_dict": lambda: saved({"state_dict": WEIGHTS, "epoch": 3}),
    "torch before 1.6": lambda: legacy({"model": WEIGHTS}),
    **{
        f"protocol {protocol}": lambda protocol=protocol: pickled({"model": arrays()}, protocol)
        for protocol in range(6)
    },
    "zoo": lambda: pickled({"model": OrderedDict(arrays()), "__author__": "third_party", "matching_heuristics": True}),
    "fortran order": lambda: pickled({n: np.array(a, order="F") for n, a in arrays().items()}),
    "other byte order": lambda: pickled({n: a.astype(a.dtype.newbyteorder(">")) for n, a in arrays().items()}),
    "scalars": lambda: pickled({**arrays(), "norm.count": np.int64(12)}),
}


@pytest.mark.parametrize("form", HONEST)
def test_every_honest_form_gives_the_same_tensors(tmp_path, form):
    assert_equal(read_bytes(tmp_path, HONEST[form]()), WEIGHTS)


def test_safetensors_are_read(tmp_path):
    assert_equal(read_bytes(tmp_path, safetensors(tmp_path)), WEIGHTS)


def test_pickles_of_python_2_are_read(tmp_path):
    """They hold bytes as strings: here an array of two float32, written by hand."""
    data = np.array([1.0, -3.5], dtype="<f4").tobytes()
    content = (
        b"\x80\x02}U\x01acnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
        b"(K\x01K\x02\x85cnumpy\ndtype\nU\x02f4K\x00K\x01\x87R(K\x03U\x01<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89U"
        + bytes([len(data)])
        + data
        + b"tbs."
    )
    assert_equal(read_bytes(tmp_path, content), {"a": torch.tensor([1.0, -3.5])})


def test_tensors_may_be_written_to_without_a_change_of_the_file(tmp_path):
    for content in (saved(WEIGHTS), pickled(arrays()), legacy(WEIGHTS)):
        read_bytes(tmp_path, content)["stem.weight"].fill_(0)
        assert (tmp_path / "checkpoint").read_bytes() == content


def test_what_stands_beside_may_share_memory_with_the_weights(tmp_path):
    copies = {name: tensor.detach() for name, tensor in WEIGHTS.items()}
    assert_equal(read_bytes(tmp_path, saved({"model": WEIGHTS, "average": copies, "best": copies})), WEIGHTS)


def test_many_names_for_one_memory_are_refused(tmp_path):
    tensor = torch.zeros(1000)
    assert "announces weights" in refusal(tmp_path, saved({f"a{index}": tensor.detach() for index in range(1000)}))


def test_what_stands_beside_the_weights_is_reported(tmp_path):
    file = tmp_path / "model.pth"
    torch.save({"model": WEIGHTS, "iteration": 41, "scheduler": {"last_epoch": 41}}, file)
    notes = " ".join(read_checkpoint(file).notes)
    assert "iteration 41" in notes
    assert "scheduler" in notes


# ------------------------------------------------------------------------------------------------- files that want to act


class Canary:
    """Makes a call when it is unpickled."""

    def __init__(self, function: Callable, *arguments: object) -> None:
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


def canaries(canary: Path) -> dict[str, Canary]:
    """Name that the pickle asks for -> what would leave a file behind, or be the first step to it."""
    touch = Canary(os.system, f"touch '{canary}'")
    return {
        "posix.system": touch,
        "builtins.exec": Canary(exec, f"open({str(canary)!r}, 'w')"),
        "io.open": Canary(open, str(canary), "w"),
        "builtins.getattr": Canary(getattr, "text", "upper"),
        "torch.storage._load_from_bytes": Canary(torch.storage._load_from_bytes, pickled(touch)),
    }


@pytest.mark.parametrize("name", canaries(Path("canary")))
@pytest.mark.parametrize("write", [pickled, saved, legacy])
def test_calls_are_named_and_never_made(tmp_path, name, write):
    content = {"model": arrays() if write is pickled else WEIGHTS, "extra": canaries(tmp_path / "canary")[name]}
    message = refusal(tmp_path, write(content))
    assert not (tmp_path / "canary").exists()
    assert f"asks for `{name}`" in message
    assert "--trust-pickle" in message
    assert "runs whatever the file contains" in message


def test_the_canary_would_sing(tmp_path):
    """Otherwise the test above would hold for calls that do nothing."""
    pickle.loads(pickled(canaries(tmp_path / "canary")["posix.system"]))
    assert (tmp_path / "canary").exists()


def instructions(*parts: bytes) -> bytes:
    return b"\x80\x04" + b"".join(parts) + b"."


NUMPY_TRICKS = {
    "array of a class of its own": b"cnumpy.core.multiarray\n_reconstruct\ncbuiltins\nexec\nK\x00\x85C\x01b\x87R",
    "numpy's own functions": b"cnumpy.testing._private.utils\nrunstring\n\x8c\x01a}\x86R",
    "arrays of objects": b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85C\x01b\x87R"
    b"(K\x01K\x01\x85cnumpy\ndtype\n\x8c\x01O\x89\x88\x87R(K\x03\x8c\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK?tb\x89]Natb",
    "types with fields": b"cnumpy\ndtype\n\x8c\x02f4\x89\x88\x87R(K\x03\x8c\x01<N\x8c\x01a}\x86}K\x08K\x01K\x00tb",
    "calls of what is no function": b"cnumpy\nndarray\nK\x05\x85R",
    "attributes of a function": b"c_codecs\nencode\n}\x8c\x0c__defaults__K\x01\x85sb",
    "attributes of a class": b"ccollections\nOrderedDict\nN}\x8c\x06updateK\x01s\x86b",
    "extensions": b"\x82\x01",
    "out-of-band buffers": b"\x97",
    "memo of the future": b"h\x07",
    "empty stack": b"R",
    "persistent identifiers": b"\x8c\x07storageQ",
    "a mark as a value": b"(\x85",
    "a key without value": b"}(\x8c\x01au",
    "a list as a key": b"}]K\x01s",
}


@pytest.mark.parametrize("trick", NUMPY_TRICKS)
def test_tricks_with_instructions_are_refused(tmp_path, trick):
    refusal(tmp_path, instructions(b"}\x8c\x01a", NUMPY_TRICKS[trick], b"s"))


def test_keys_that_are_nested_deeply_do_not_end_the_process(tmp_path):
    """Python's own hash of such a tuple overflows the stack."""
    refusal(tmp_path, instructions(b"}", b")" + b"\x85" * 500_000, b"K\x01s"))


def test_storages_of_other_kinds_are_refused(tmp_path):
    storage = b"(\x8c\x07storagectorch.hub\nload\n\x8c\x010\x8c\x03cpuK\x01tQ"
    message = refusal(tmp_path, zip_of_torch(instructions(b"}\x8c\x01a", storage, b"s"), {"0": bytes(4)}))
    assert "torch.hub.load" in message


def test_trust_loads_classes_that_the_user_asks_for(tmp_path):
    content = {"model": WEIGHTS, "args": argparse.Namespace(seed=3)}
    assert "argparse.Namespace" in refusal(tmp_path, saved(content))
    for written in (saved(content), legacy(content)):
        assert_equal(read_bytes(tmp_path, written, trust_pickle=True), WEIGHTS)
    of_arrays = pickled({"model": arrays(), "args": argparse.Namespace(seed=3)})
    assert "argparse.Namespace" in refusal(tmp_path, of_arrays)
    assert_equal(read_bytes(tmp_path, of_arrays, trust_pickle=True), WEIGHTS)


def test_trust_changes_nothing_for_plain_files(tmp_path):
    with sys_audit() as events:
        read_bytes(tmp_path, pickled(arrays()), trust_pickle=True)
    assert "pickle.find_class" not in events


class sys_audit:  # noqa: N801 - used like a function
    """Names of the audit events inside a block. Hooks cannot be removed, so it only stops to listen."""

    def __enter__(self) -> list[str]:
        self.events, self.listening = [], True
        sys.addaudithook(lambda name, _: self.events.append(name) if self.listening else None)
        return self.events

    def __exit__(self, *_: object) -> None:
        self.listening = False


# -------------------------------------------------------------------------------------------------- files that lie in size


def zip_of_torch(main: bytes, storages: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        archive.writestr("archive/data.pkl", main)
        archive.writestr("archive/byteorder", b"little")
        archive.writestr("archive/version", b"3\n")
        for name, data in storages.items():
            archive.writestr(f"archive/data/{name}", data)
    return buffer.getvalue()


def tensor_instructions(num_items: int, shape: bytes, stride: bytes) -> bytes:
    """A dictionary with one tensor of a storage of float32."""
    storage = b"(\x8c\x07storagectorch\nFloatStorage\n\x8c\x010\x8c\x03cpu" + long(num_items) + b"tQ"
    return (
        b"\x80\x02}\x8c\x01a"
        + b"ctorch._utils\n_rebuild_tensor_v2\n("
        + storage
        + b"K\x00"
        + shape
        + stride
        + b"\x89NtRs."
    )


def long(number: int) -> bytes:
    return b"\x8a\x08" + struct.pack("<q", number)


TERA = 2**40
LIES = {
    "a tensor larger than its storage": zip_of_torch(
        tensor_instructions(4, long(TERA) + b"\x85", b"K\x01\x85"), {"0": bytes(16)}
    ),
    "one number repeated": zip_of_torch(tensor_instructions(1, long(TERA) + b"\x85", b"K\x00\x85"), {"0": bytes(4)}),
    "a storage larger than its record": zip_of_torch(
        tensor_instructions(TERA, long(TERA) + b"\x85", b"K\x01\x85"), {"0": bytes(16)}
    ),
    "a compressed bomb": zip_of_torch(b"}" + b"\x00" * 50 * MEBIBYTE, {}, zipfile.ZIP_DEFLATED),
    "an array larger than its bytes": instructions(
        b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85C\x01b\x87R(K\x01",
        long(TERA) + b"\x85cnumpy\ndtype\n\x8c\x02f4\x89\x88\x87R\x89C\x04abcdtb",
    ),
    "bytes beyond the end": instructions(b"\x8e" + struct.pack("<Q", TERA)),
    "a string beyond the end": instructions(b"\x8d" + struct.pack("<Q", TERA)),
    "a memo of two thousand million": instructions(b"}r\xff\xff\xff\x7f"),
    "a frame beyond the end": instructions(b"\x95" + struct.pack("<Q", TERA) + b"K\x01"),
    "empty bytes of a great length": instructions(b"cbuiltins\nbytearray\n", long(TERA) + b"\x85R"),
    "copies of one list": instructions(b"](" + b"K\x01" * 100_000 + b"e\x94", b"cbuiltins\nset\nh\x00\x85R" * 1000),
    "a header of safetensors": struct.pack("<Q", TERA) + b'{"a":{}}',
    "an array of safetensors": struct.pack("<Q", 74)
    + b'{"a":{"dtype":"F32","shape":[274877906944],"data_offsets":[0,1099511627776]}}',
}


@pytest.mark.parametrize("lie", LIES)
def test_announced_sizes_take_no_memory(tmp_path, lie):
    tracemalloc.start()
    try:
        refusal(tmp_path, LIES[lie])
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 40 * MEBIBYTE


def test_many_empty_objects_are_refused_before_they_fill_the_memory(tmp_path):
    """An empty set takes one byte of the file and 216 of memory."""
    assert "instructions" in refusal(tmp_path, instructions(b"\x8f" * 1_100_000))


def test_storages_of_older_files_are_not_allocated(tmp_path):
    content = legacy({"a": torch.zeros(4)})
    num_items = content.index(b"K\x04", content.index(b"storage"))
    message = refusal(tmp_path, content[:num_items] + long(TERA) + content[num_items + 2 :])
    assert "announces" in message


def test_one_array_under_many_names_is_refused(tmp_path):
    array = np.zeros(1000, dtype=np.float32)
    refusal(tmp_path, pickled({f"a{index}": array for index in range(1000)}))


# ------------------------------------------------------------------------------------------------------ files that are not


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"model": {"a": "a string"}}, "str"),
        ({"model": {"a": np.array(["text"])}}, "type"),
        ({"model": {"a": np.array([1 + 2j])}}, "type"),
        ({"model": {"a": [1.0, 2.0]}}, "list"),
        ({"model": {"a": None}}, "NoneType"),
        ({"model": {3: np.zeros(2)}}, "not a string"),
        ({"model": {}}, "empty"),
        ([np.zeros(2)], "list"),
        (3, "int"),
        ({"model": {"backbone": {"a": np.zeros(2)}}}, "dict"),
    ],
)
def test_other_content_is_named(tmp_path, content, said):
    assert said in refusal(tmp_path, pickled(content))


def test_sparse_and_quantized_tensors_are_refused(tmp_path):
    refusal(tmp_path, saved({"a": torch.eye(3).to_sparse()}))
    refusal(tmp_path, saved({"a": torch.tensor([1 + 2j])}))


def test_a_missing_file_says_so(tmp_path):
    with pytest.raises(ConversionError, match="there is no file"):
        read_checkpoint(tmp_path / "missing.pth")


def test_a_folder_says_so(tmp_path):
    with pytest.raises(ConversionError, match="is a folder"):
        read_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n", "Git LFS"),
        (b"<!DOCTYPE html><html>", "web page"),
        (b"just some text", "begins with"),
        (b"PK\x03\x04 and nothing more", "damaged zip"),
        (bytes(4096), "begins with"),
    ],
)
def test_files_of_other_kinds_are_told_apart(tmp_path, content, said):
    assert said in refusal(tmp_path, content)


def test_zips_of_other_kinds_are_told_apart(tmp_path):
    buffer = io.BytesIO()
    np.savez(buffer, a=np.zeros(3))
    assert "zip of another kind" in refusal(tmp_path, buffer.getvalue())
    main = pickled({}, protocol=2)
    assert "TorchScript" in refusal(tmp_path, zip_of_torch(main, {"constants.pkl": main}))


@pytest.mark.parametrize("form", ["zip of torch", "torch before 1.6", "protocol 2", "protocol 4", "protocol 5"])
def test_truncated_files_are_refused_wherever_they_end(tmp_path, form):
    content = HONEST[form]()
    for end in range(1, len(content) - 1, max(1, len(content) // 60)):
        refusal(tmp_path, content[:end])


def test_truncated_safetensors_are_refused(tmp_path):
    content = safetensors(tmp_path)
    for end in range(1, len(content) - 1, 7):
        refusal(tmp_path, content[:end])
