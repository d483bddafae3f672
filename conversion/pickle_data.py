"""A pickle read as data: what it holds, without running anything that it asks for.

A pickle is a program: `pickle.load` imports and calls whatever the file names. Here a small machine follows its instructions (as
`pickletools` decodes them) and makes plain containers, and descriptions of arrays and tensors; it imports and calls nothing. The
names that a file may use are the tables `PLAIN_NAMES`, `NUMPY_NAMES` and `TORCH_NAMES`; any other name is an error that tells it.

Memory is bounded by the file: no read is longer than what is left of it, arrays hold the bytes that were read, and the number of
instructions is limited. (`pickle.load` itself can be made to allocate gigabytes by a file of ten bytes.)
"""

import math
import pickletools
import re
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import BinaryIO, TypeVar

import numpy as np

T = TypeVar("T")

# A model of 2000 tensors needs about 100 000; more would be an attempt to fill the memory with empty objects.
MAX_INSTRUCTIONS = 1_000_000
MAX_NAME = 500
MAX_AXES = 64
STORAGE_ITEM_SIZES = {
    "DoubleStorage": 8,
    "FloatStorage": 4,
    "HalfStorage": 2,
    "BFloat16Storage": 2,
    "LongStorage": 8,
    "IntStorage": 4,
    "ShortStorage": 2,
    "CharStorage": 1,
    "ByteStorage": 1,
    "BoolStorage": 1,
}


class PickleDataError(ValueError):
    """The instructions of a pickle make no sense."""


class ForeignNameError(PickleDataError):
    """A pickle asks for a class or a function that plain weights do not need."""

    def __init__(self, name: str) -> None:
        super().__init__(f"asks for `{name}`")
        self.name = name


@dataclass
class StoredArray:
    """A numpy array of a pickle. `data` is `None` until its state has been read.

    Attributes:
        shape: of the array.
        dtype: a plain number type.
        fortran: the first axis is the fastest one.
        data: its bytes, as the file holds them; a string of characters below 256 in old protocols.
    """

    shape: tuple[int, ...] = ()
    dtype: np.dtype | None = None
    fortran: bool = False
    data: bytes | bytearray | str | None = None

    @property
    def num_bytes(self) -> int:
        """Memory of the array."""
        return len(self.data or b"")

    def take(self) -> np.ndarray:
        """The array, writeable and in the byte order of this machine; its bytes here are dropped."""
        if self.data is None or self.dtype is None:
            raise PickleDataError("has an array without content")
        try:
            data = self.data.encode("latin1") if isinstance(self.data, str) else self.data
        except UnicodeEncodeError as error:
            raise PickleDataError("has an array whose bytes are none") from error
        flat = np.frombuffer(data, dtype=self.dtype)
        array = flat.astype(self.dtype.newbyteorder("=")).reshape(self.shape, order="F" if self.fortran else "C")
        self.data = None
        return np.ascontiguousarray(array).reshape(self.shape)


@dataclass(frozen=True)
class StoredStorage:
    """Memory that tensors of a torch file share: `num_items` numbers of the type `kind`, such as `FloatStorage`."""

    kind: str
    key: str
    num_items: int

    @property
    def num_bytes(self) -> int:
        """Memory of the storage."""
        return self.num_items * STORAGE_ITEM_SIZES[self.kind]


@dataclass(frozen=True)
class StoredTensor:
    """A view of a storage."""

    storage: StoredStorage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.shape) != len(self.stride) or self.offset < 0 or min((*self.shape, *self.stride), default=0) < 0:
            raise PickleDataError(f"has a tensor of shape {self.shape}, strides {self.stride} and offset {self.offset}")
        last = self.offset + sum((size - 1) * step for size, step in zip(self.shape, self.stride, strict=True))
        inside = last < self.storage.num_items and math.prod(self.shape) <= self.storage.num_items
        if 0 not in self.shape and not inside:
            raise PickleDataError(
                f"has a tensor of shape {self.shape} whose storage holds {self.storage.num_items} numbers only"
            )


class BoundedFile:
    """A binary file from which no read can ask for more than is left of it."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self.file = file
        self.size = self.left = size

    def read(self, num_bytes: int) -> bytes:
        """The next bytes; all of them."""
        if not 0 <= num_bytes <= self.left:
            raise PickleDataError(f"announces {num_bytes} bytes where {self.left} are left")
        self.left -= num_bytes
        return self.file.read(num_bytes)

    def tell(self) -> int:
        """How many bytes have been read."""
        return self.size - self.left

    def readline(self) -> bytes:
        """The next line, with its end."""
        line = self.file.readline(self.left)
        self.left -= len(line)
        return line


def read_pickle(file: BoundedFile, *, of_torch: bool = False) -> object:
    """Read the next pickle of a file as data.

    Args:
        file: at the beginning of a pickle; left behind its end.
        of_torch: a part of a file of `torch.save`: tensors and their storages instead of arrays.

    Returns:
        Plain Python values; `StoredArray`, `StoredTensor` and `StoredStorage` in place of arrays, tensors and storages.

    Raises:
        ForeignNameError: it asks for a name that is not in the tables below.
        PickleDataError: it is damaged, or no pickle.
    """
    machine = _Machine(of_torch)
    try:
        machine.run(file)
        return machine.pop()
    except PickleDataError:
        raise
    except (ValueError, TypeError, KeyError, IndexError, OverflowError, ArithmeticError, MemoryError) as error:
        reason = str(error)[:100] or type(error).__name__
        raise PickleDataError(f"is damaged at byte {machine.position} ({reason})") from error


# ------------------------------------------------------------------------------------------------------------------ machine


@dataclass(frozen=True)
class _Name:
    """A class or function that a pickle has named; never looked up."""

    path: str


class _Mark:
    """Marks a place on the stack."""


_MARK = _Mark()

# Instructions whose argument is the value itself.
_VALUES = frozenset(
    {
        *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
        *("STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
        *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"),
    }
)
_MAKERS: Mapping[str, Callable[[], object]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_TUPLE": tuple,
    "EMPTY_LIST": list,
    "EMPTY_DICT": dict,
    "EMPTY_SET": set,
    "MARK": lambda: _MARK,
}
_PUTS = ("PUT", "BINPUT", "LONG_BINPUT")
_GETS = ("GET", "BINGET", "LONG_BINGET")


class _Machine:
    """The stack and the memo of a pickle."""

    def __init__(self, of_torch: bool) -> None:
        self.of_torch = of_torch
        self.allowed = PLAIN_NAMES | (TORCH_NAMES if of_torch else NUMPY_NAMES)
        self.stack: list[object] = []
        self.memo: dict[int, object] = {}
        self.num_copied = 0
        self.position = 0

    def run(self, file: BoundedFile) -> None:
        """Follow the instructions up to the end of the pickle."""
        for count, (opcode, argument, position) in enumerate(pickletools.genops(file)):
            self.position = position or 0
            if count >= MAX_INSTRUCTIONS:
                raise PickleDataError(f"has more than {MAX_INSTRUCTIONS} instructions")
            self.follow(opcode.name, argument)

    def construct(self, callee: object, arguments: tuple) -> None:
        """Put what a call would make on the stack. Copies of one long list count like instructions."""
        self.num_copied += sum(len(value) for value in arguments if isinstance(value, list | tuple | dict | set))
        if self.num_copied > MAX_INSTRUCTIONS:
            raise PickleDataError(f"copies more than {MAX_INSTRUCTIONS} values")
        self.stack.append(self.allowed[_expect(callee, _Name).path](*arguments))

    def look_up(self, module: str, name: str) -> _Name:
        if len(module) + len(name) > MAX_NAME:
            raise PickleDataError(f"has a name of {len(module) + len(name)} characters")
        module = {"__builtin__": "builtins"}.get(module, module).replace("numpy._core.", "numpy.core.")
        path = f"{module}.{name}"
        if path not in self.allowed:
            raise ForeignNameError(path)
        return _Name(path)

    def pop(self) -> object:
        value = self.stack.pop()
        if value is _MARK:
            raise PickleDataError("takes a mark for a value")
        return value

    def pop_to_mark(self) -> list[object]:
        items: list[object] = []
        while (value := self.stack.pop()) is not _MARK:
            items.append(value)
        return items[::-1]

    def follow(self, name: str, argument: object) -> None:
        """Do what one instruction says."""
        if name in _VALUES:
            self.stack.append(argument)
        elif name in _MAKERS:
            self.stack.append(_MAKERS[name]())
        elif name in _PUTS:
            self.memo[argument] = self.stack[-1]
        elif name in _GETS:
            self.stack.append(self.memo[argument])
        elif name not in {"PROTO", "FRAME", "STOP"}:
            step = getattr(self, f"do_{name.lower()}", None)
            if step is None:
                raise PickleDataError(f"has the instruction {name}, which plain weights do not need")
            step(argument)

    def do_memoize(self, _: None) -> None:
        self.memo[len(self.memo)] = self.stack[-1]

    def do_pop(self, _: None) -> None:
        self.stack.pop()

    def do_pop_mark(self, _: None) -> None:
        self.pop_to_mark()

    def do_list(self, _: None) -> None:
        self.stack.append(self.pop_to_mark())

    def do_tuple(self, _: None) -> None:
        self.stack.append(tuple(self.pop_to_mark()))

    def do_dict(self, _: None) -> None:
        self.stack.append(_pairs(self.pop_to_mark()))

    def do_frozenset(self, _: None) -> None:
        self.stack.append(_plain_set(self.pop_to_mark()))

    def do_dup(self, _: None) -> None:
        self.stack.append(self.stack[-1])

    def do_tuple1(self, _: None) -> None:
        self.stack.append((self.pop(),))

    def do_tuple2(self, _: None) -> None:
        second, first = self.pop(), self.pop()
        self.stack.append((first, second))

    def do_tuple3(self, _: None) -> None:
        third, second, first = self.pop(), self.pop(), self.pop()
        self.stack.append((first, second, third))

    def do_append(self, _: None) -> None:
        value = self.pop()
        _expect(self.stack[-1], list).append(value)

    def do_appends(self, _: None) -> None:
        items = self.pop_to_mark()
        _expect(self.stack[-1], list).extend(items)

    def do_setitem(self, _: None) -> None:
        value, key = self.pop(), self.pop()
        _expect(self.stack[-1], dict).update(_pairs([key, value]))

    def do_setitems(self, _: None) -> None:
        items = self.pop_to_mark()
        _expect(self.stack[-1], dict).update(_pairs(items))

    def do_additems(self, _: None) -> None:
        items = self.pop_to_mark()
        _expect(self.stack[-1], set).update(_plain_set(items))

    def do_global(self, argument: str) -> None:
        module, _, name = argument.partition(" ")
        self.stack.append(self.look_up(module, name))

    def do_stack_global(self, _: None) -> None:
        name, module = _expect(self.pop(), str), _expect(self.pop(), str)
        self.stack.append(self.look_up(module, name))

    def do_reduce(self, _: None) -> None:
        arguments, callee = _expect(self.pop(), tuple), self.pop()
        self.construct(callee, arguments)

    do_newobj = do_reduce

    def do_newobj_ex(self, _: None) -> None:
        keywords = _expect(self.pop(), dict)
        if keywords:
            raise PickleDataError("makes an object with named arguments")
        self.do_reduce(None)

    def do_inst(self, argument: str) -> None:
        arguments = tuple(self.pop_to_mark())
        self.do_global(argument)
        self.construct(self.pop(), arguments)

    def do_obj(self, _: None) -> None:
        callee, *arguments = self.pop_to_mark()
        self.construct(callee, tuple(arguments))

    def do_build(self, _: None) -> None:
        state, target = self.pop(), self.stack[-1]
        if isinstance(target, StoredArray):
            _set_array(target, _expect(state, tuple))
        elif isinstance(target, _StoredType):
            target.set_state(_expect(state, tuple))
        elif not isinstance(target, dict):  # an OrderedDict has attributes, such as torch's versions of modules
            raise PickleDataError(f"sets attributes of a {type(target).__name__}")

    def do_binpersid(self, _: None) -> None:
        identifier = _expect(self.pop(), tuple)
        if not self.of_torch:
            raise PickleDataError("refers to something outside of it")
        kind, storage_class, key, _location, num_items, *views = identifier
        storage_name = _expect(storage_class, _Name).path.removeprefix("torch.")
        if kind != "storage" or storage_name not in STORAGE_ITEM_SIZES or any(view is not None for view in views):
            raise PickleDataError(f"refers to a storage of the type {storage_name}")
        self.stack.append(StoredStorage(storage_name, _expect(key, str), _natural(num_items)))


# ------------------------------------------------------------------------------------------------------------- constructors


class _StoredType:
    """A number type of numpy; its byte order comes with its state."""

    def __init__(self, code: str) -> None:
        if not re.fullmatch(r"[<>=|]?(b1|\?|[iu][1248]|f[248])", code):
            raise PickleDataError(f"has an array of the type {code[:20]!r}, expected plain numbers")
        self.dtype = np.dtype(code)

    def set_state(self, state: tuple) -> None:
        """Take over the byte order; types with fields or sub-arrays are refused."""
        _version, byte_order, sub_array, names, fields, *_ = state
        if not (sub_array is names is fields is None and byte_order in set("<>=|")):
            raise PickleDataError("has an array of a type with fields")
        self.dtype = self.dtype.newbyteorder(byte_order)


def _make_type(code: object, *_: object) -> _StoredType:
    return _StoredType(_expect(code, str))


def _make_array(kind: object, *_: object) -> StoredArray:
    if not isinstance(kind, _Name) or kind.path != "numpy.ndarray":
        raise PickleDataError("makes an array of a class of its own")
    return StoredArray()


def _set_array(array: StoredArray, state: tuple) -> None:
    *_, shape, stored_type, fortran, data = state
    if not isinstance(data, bytes | bytearray | str):
        raise PickleDataError("has an array of Python objects, expected plain numbers")
    array.shape = _naturals(shape)
    array.dtype = _expect(stored_type, _StoredType).dtype
    array.fortran = bool(fortran)
    expected = math.prod(array.shape) * array.dtype.itemsize
    if expected != len(data):
        raise PickleDataError(f"has an array of shape {array.shape} ({expected} bytes) with {len(data)} bytes")
    array.data = data


def _make_scalar(stored_type: object, data: object) -> StoredArray:
    scalar = StoredArray()
    _set_array(scalar, ((), stored_type, False, data))
    return scalar


def _make_from_buffer(data: object, stored_type: object, shape: object, order: object) -> StoredArray:
    array = StoredArray()
    _set_array(array, (shape, stored_type, order == "F", data))
    return array


def _make_bytes(text: object = "", encoding: object = "latin1") -> str:
    """How Python 3 writes bytes in old protocols. They stay a string: many copies of one could fill the memory."""
    if encoding not in ["latin1", "latin-1"]:  # not a set: it might not be hashable
        raise PickleDataError("encodes bytes in an unusual way")
    return _expect(text, str)


def _make_mapping(items: object = ()) -> dict:
    if isinstance(items, dict):
        return dict(items)
    pairs = [_expect_items(pair) for pair in _expect_items(items)]
    return {_plain_key(key): value for key, value in pairs}


def _make_tensor(storage: object, offset: object, shape: object, stride: object, *_: object) -> StoredTensor:
    return StoredTensor(_expect(storage, StoredStorage), _natural(offset), _naturals(shape), _naturals(stride))


def _make_parameter(tensor: object, *_: object) -> StoredTensor:
    return _expect(tensor, StoredTensor)


def _not_callable(*_: object) -> None:
    raise PickleDataError("calls what is no function")


# What a pickle may name, and what a call of it makes here.
PLAIN_NAMES: dict[str, Callable[..., object]] = {
    "collections.OrderedDict": _make_mapping,
    "collections.Counter": _make_mapping,
    "builtins.set": lambda items=(): _plain_set(items),
    "_codecs.encode": _make_bytes,
    "builtins.bytes": _make_bytes,
}
NUMPY_NAMES: dict[str, Callable[..., object]] = {
    "numpy.ndarray": _not_callable,
    "numpy.dtype": _make_type,
    "numpy.core.multiarray._reconstruct": _make_array,
    "numpy.core.multiarray.scalar": _make_scalar,
    "numpy.core.numeric._frombuffer": _make_from_buffer,
}
TORCH_NAMES: dict[str, Callable[..., object]] = {
    "torch.Size": lambda sizes=(): _naturals(sizes),
    "torch._utils._rebuild_tensor": _make_tensor,
    "torch._utils._rebuild_tensor_v2": _make_tensor,
    "torch._utils._rebuild_parameter": _make_parameter,
    **{f"torch.{name}": _not_callable for name in STORAGE_ITEM_SIZES},
}


def _expect(value: object, kind: type[T]) -> T:
    if not isinstance(value, kind):
        raise PickleDataError(f"has a {type(value).__name__} where another kind of value belongs")
    return value


def _expect_items(value: object) -> Sequence[object]:
    return value if isinstance(value, list) else _expect(value, tuple)


def _natural(value: object) -> int:
    if type(value) is not int or not 0 <= value < 2**63:
        raise PickleDataError(f"has a {type(value).__name__} where a length belongs")
    return value


def _naturals(values: object) -> tuple[int, ...]:
    numbers = _expect_items(values)
    if len(numbers) > MAX_AXES:
        raise PickleDataError(f"has a shape of {len(numbers)} axes")
    return tuple(_natural(number) for number in numbers)


def _plain_key(key: object) -> Hashable:
    # Nested tuples could be hashed too, but the hash of a very deep one ends the process.
    if key is not None and not isinstance(key, str | int | float | bytes):
        raise PickleDataError(f"has a {type(key).__name__} as a key")
    return key


def _plain_set(items: object) -> set:
    return {_plain_key(item) for item in _expect_items(items)}


def _pairs(items: Sequence[object]) -> dict:
    if len(items) % 2:
        raise PickleDataError("has a key without a value")
    return {_plain_key(key): value for key, value in zip(items[::2], items[1::2], strict=True)}
