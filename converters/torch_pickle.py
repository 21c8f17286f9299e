"""The pickles of torch files, read by a machine that knows tensors and containers and can call nothing.

``pickletools`` takes a pickle apart; the machine here runs what torch writes for a state dict (protocol 2)
and refuses every other instruction. Names of functions and types become inert marks. A few have a meaning
here (what puts a tensor together, types of elements, ``OrderedDict``); all others are refused.
"""

from __future__ import annotations

import io
import pickletools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

# torch's storage types: element type and bytes of an element
STORAGES = {
    "FloatStorage": ("float32", 4), "BFloat16Storage": ("bfloat16", 2), "HalfStorage": ("float16", 2),
    "DoubleStorage": ("float64", 8), "LongStorage": ("int64", 8), "IntStorage": ("int32", 4),
    "ShortStorage": ("int16", 2), "CharStorage": ("int8", 1), "ByteStorage": ("uint8", 1),
    "BoolStorage": ("bool", 1), "ComplexFloatStorage": ("complex64", 8),
    "ComplexDoubleStorage": ("complex128", 16),
}  # fmt: skip
_REBUILD = ("torch._utils", "_rebuild_tensor_v2"), ("torch._utils", "_rebuild_parameter")
_DICT = ("collections", "OrderedDict")
# tensors of other kinds, known so that a refusal can say what was found
_OTHER: dict[tuple[str, str], Callable[..., Any]] = {
    ("torch._utils", "_rebuild_sparse_tensor"): lambda layout, parts: Other(parts[1].storage.dtype),
    ("torch._utils", "_rebuild_meta_tensor_no_storage"): lambda dtype, *_: Other(dtype.name),
    ("torch.serialization", "_get_layout"): lambda name: None,
    ("torch", "Size"): lambda sizes: sizes,
}
# a released set of gates has some 30 kB of instructions
LARGEST = 1 << 24


class Refused(Exception):
    """The pickle is not one of plain tensors; ``asks`` is the function or type it wants, if that is why."""

    def __init__(self, what: str, asks: str = "") -> None:
        super().__init__(what)
        self.asks = asks


@dataclass(frozen=True)
class Name:
    """A function or type that a pickle names. Nothing is imported."""

    module: str
    name: str

    @property
    def is_storage(self) -> bool:
        return self.module == "torch" and self.name in STORAGES

    @property
    def pair(self) -> tuple[str, str]:
        return self.module, self.name


@dataclass(frozen=True)
class Storage:
    """A run of ``count`` elements of one type, held in the file under ``key``."""

    key: str
    dtype: str
    itemsize: int
    count: int

    @property
    def nbytes(self) -> int:
        return self.count * self.itemsize


@dataclass(frozen=True)
class View:
    """A tensor: where it lies in its storage, counted in elements."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


@dataclass(frozen=True)
class Other:
    """A tensor that is not dense."""

    dtype: str


class _Mark:
    pass


def load(file: io.BytesIO) -> Any:
    """The object of the next pickle: str, numbers, None, lists, tuples, dicts and the classes above.

    Raises:
        Refused: anything else is in it, or it is damaged.
    """
    start = file.tell()
    machine = _Machine()
    try:
        for code, argument, _ in pickletools.genops(file):
            if file.tell() - start > LARGEST:
                raise Refused("is far too long")
            if code.name == "STOP":
                return machine.result()
            machine.step(code.name, argument)
    except Refused:
        raise
    except Exception as error:  # a damaged pickle can raise nearly anything
        raise Refused(f"is damaged: {error!r}") from error
    raise Refused("does not end")


class _Machine:
    """The stack machine of pickles; only the instructions in ``_STEPS`` exist."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def step(self, name: str, argument: Any) -> None:
        if name in _CONSTANTS:
            self.stack.append(_CONSTANTS[name]())
        elif name in _VALUES:
            self.stack.append(argument)
        elif name in ("BINPUT", "LONG_BINPUT"):
            self.memo[argument] = self.stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            self.stack.append(self.memo[argument])
        elif name in _STEPS:
            _STEPS[name](self, argument)
        elif name != "PROTO":
            raise Refused(f"has the instruction {name}")
        elif argument != 2:
            raise Refused(f"has protocol {argument}")

    def result(self) -> Any:
        (found,) = self.stack
        return found

    def _since_mark(self) -> list[Any]:
        """What lies above the last mark, which goes as well."""
        place = len(self.stack) - 1
        while not isinstance(self.stack[place], _Mark):
            place -= 1
            if place < 0:
                raise Refused("has no mark")
        taken = self.stack[place + 1 :]
        del self.stack[place:]
        return taken

    def global_(self, argument: str) -> None:
        name = Name(*argument.split(" ", 1))
        is_dtype = name.module == "torch" and name.name in {dtype for dtype, _ in STORAGES.values()}
        if not (name.is_storage or is_dtype or name.pair in (*_REBUILD, *_OTHER, _DICT)):
            raise Refused("asks for more than tensors", f"{name.module}.{name.name}")
        self.stack.append(name)

    def persistent(self, _: Any) -> None:
        """A storage: ``("storage", type, key, location, count)``, in old files with an unused view."""
        kind, of, key, location, count, *view = self.stack.pop()
        good = kind == "storage" and isinstance(of, Name) and of.is_storage and type(key) is str
        if not good or type(location) is not str or not _is_count(count) or view not in ([], [None]):
            raise Refused("names a storage in another way than torch")
        self.stack.append(Storage(key, *STORAGES[of.name], count))

    def reduce(self, _: Any) -> None:
        arguments = self.stack.pop()
        what = self.stack.pop()
        if not isinstance(what, Name) or not isinstance(arguments, tuple):
            raise Refused("calls something that is no name")
        if what.pair == _DICT and arguments == ():
            self.stack.append({})
        elif what.pair == _REBUILD[0]:
            self.stack.append(_view(*arguments[:4]))
        elif what.pair == _REBUILD[1] and isinstance(arguments[0], View):
            self.stack.append(arguments[0])
        elif what.pair in _OTHER:
            self.stack.append(_OTHER[what.pair](*arguments))
        else:
            raise Refused(f"calls {what.name} in another way than torch")

    def build(self, _: Any) -> None:
        self.stack.pop()  # the versions of a state dict's modules
        if not isinstance(self.stack[-1], dict):
            raise Refused("sets attributes")

    def set_items(self, _: Any) -> None:
        self._fill(self._since_mark())

    def set_item(self, _: Any) -> None:
        pair = self.stack[-2:]
        del self.stack[-2:]
        self._fill(pair)

    def _fill(self, items: list[Any]) -> None:
        for key, value in zip(items[::2], items[1::2], strict=True):
            # hashing nested tuples could exhaust C's stack
            if type(key) not in (str, int):
                raise Refused(f"has a {type(key).__name__} for a key")
            if type(self.stack[-1]) is not dict:
                raise Refused("sets items of something else than a dict")
            self.stack[-1][key] = value

    def append(self, _: Any) -> None:
        value = self.stack.pop()
        self._extend([value])

    def appends(self, _: Any) -> None:
        self._extend(self._since_mark())

    def _extend(self, values: list[Any]) -> None:
        if type(self.stack[-1]) is not list:
            raise Refused("appends to something else than a list")
        self.stack[-1].extend(values)

    def tuple_(self, _: Any) -> None:
        self.stack.append(tuple(self._since_mark()))

    def tuple_of(self, size: int) -> None:
        items = self.stack[-size:]
        if len(items) < size:
            raise Refused("has too few values")
        del self.stack[-size:]
        self.stack.append(tuple(items))


def _view(storage: Any, offset: Any, shape: Any, strides: Any) -> View:
    counts = (offset, *shape, *strides)
    if not isinstance(storage, Storage) or not all(map(_is_count, counts)) or len(shape) != len(strides):
        raise Refused("describes a tensor in another way than torch")
    return View(storage, offset, tuple(shape), tuple(strides))


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 62


_CONSTANTS: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None, "NEWTRUE": lambda: True, "NEWFALSE": lambda: False, "MARK": _Mark,
    "EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple,
}  # fmt: skip
_VALUES = ("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE")
_STEPS: dict[str, Callable[[_Machine, Any], None]] = {
    "GLOBAL": _Machine.global_,
    "BINPERSID": _Machine.persistent,
    "REDUCE": _Machine.reduce,
    "BUILD": _Machine.build,
    "SETITEMS": _Machine.set_items,
    "SETITEM": _Machine.set_item,
    "APPEND": _Machine.append,
    "APPENDS": _Machine.appends,
    "TUPLE": _Machine.tuple_,
    "TUPLE1": lambda machine, _: machine.tuple_of(1),
    "TUPLE2": lambda machine, _: machine.tuple_of(2),
    "TUPLE3": lambda machine, _: machine.tuple_of(3),
}
