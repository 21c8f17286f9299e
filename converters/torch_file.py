"""State dicts in torch files (.pth): read without torch, and without running what is in them; written by it.

A file is a zip archive of a pickle (:mod:`.torch_pickle`) and a record for each storage, or, from before
torch 1.6, pickles in a row with the storages behind them.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mlx_kvret.core.tensors import Tensor
from mlx_kvret.core.types import Array
from mlx_kvret.errors import CheckpointError, MissingDependencyError

from .casting import DTYPES
from .torch_pickle import LARGEST, Other, Refused, Storage, View, load

_LEGACY = (0x1950A86A20F9469CFC6C, 1001)
_BITS = {"float32": "<f4", "bfloat16": "<u2", "float16": "<f2"}
# as many as numpy has
_MOST_DIMENSIONS = 32

Bytes = bytes | memoryview


def read_state(path: Path) -> dict[str, Tensor]:
    """The tensors of a state dict, bits unchanged.

    Raises:
        CheckpointError: missing, damaged, not a state dict of float tensors, or it asks for code to run.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} does not exist; a trimkv folder needs this file") from error
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error
    try:
        state, record = _open(content)
        if not isinstance(state, dict):
            raise CheckpointError(f"it holds a {type(state).__name__}; expected a state dict of tensors")
        return _tensors(state, record, len(content))
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    except Refused as error:
        raise CheckpointError(f"{path} {_refusal(error)}; nothing in it was executed") from error


def write_state(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Save a state dict. Names that share a :class:`Tensor` share their storage in the file, too.

    Raises:
        MissingDependencyError: torch is not installed.
    """
    try:
        import torch
    except ImportError as error:
        raise MissingDependencyError(
            "trimkv gates are torch files and writing one needs torch; run `pip install torch`"
        ) from error
    made = {id(tensor): _to_torch(torch, tensor) for tensor in tensors.values()}
    # torch reports a full disk as RuntimeError, a plain write as OSError
    buffer = io.BytesIO()
    torch.save({name: made[id(tensor)] for name, tensor in tensors.items()}, buffer)
    path.write_bytes(buffer.getbuffer())


def _open(content: bytes) -> tuple[Any, Callable[[Storage], Bytes]]:
    """The object in a torch file, and what gives a storage's bytes."""
    if not content.startswith(b"PK"):
        return _open_legacy(content)
    try:
        archive = zipfile.ZipFile(io.BytesIO(content))
        names = [entry.filename for entry in archive.infolist()]
        (pickled,) = [name for name in names if name.count("/") == 1 and name.endswith("/data.pkl")]
        root = pickled.removesuffix("data.pkl")
        stored = all(entry.compress_type == zipfile.ZIP_STORED for entry in archive.infolist())
        if not stored or len(set(names)) < len(names) or archive.getinfo(pickled).file_size > LARGEST:
            raise Refused("has records that torch does not write")
        order = f"{root}byteorder"
        if order in names and archive.read(order) != b"little":
            raise Refused("comes from a big-endian machine")
        state = load(io.BytesIO(archive.read(pickled)))
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, RuntimeError, EOFError) as error:
        raise Refused(f"is damaged: {error}") from error

    def record(storage: Storage) -> Bytes:
        try:
            return archive.read(f"{root}data/{storage.key}")
        except Exception as error:  # KeyError, BadZipFile, and what a damaged entry makes of zipfile
            raise Refused(f"lacks a storage: {error}") from error

    return state, record


def _open_legacy(content: bytes) -> tuple[Any, Callable[[Storage], Bytes]]:
    file = io.BytesIO(content)
    if tuple(load(file) for _ in _LEGACY) != _LEGACY:
        raise Refused("has another beginning")
    system = load(file)
    if not isinstance(system, dict) or system.get("little_endian") is not True:
        raise Refused("comes from a big-endian machine")
    state, keys = load(file), load(file)
    if not isinstance(keys, list) or not all(type(key) is str for key in keys):
        raise Refused("lists its storages in another way than torch")
    whole, start = memoryview(content), file.tell()
    places = dict[str, int]()
    sizes = _sizes(state)
    for key in keys:
        places[key] = start + 8
        # a count of elements, then the elements
        start += 8 + sizes.get(key, 0)

    def record(storage: Storage) -> Bytes:
        if storage.key not in places:
            raise Refused("lacks a storage")
        begin = places[storage.key]
        if int.from_bytes(whole[begin - 8 : begin], "little") != storage.count:
            raise Refused("has a storage of another size")
        return whole[begin : begin + storage.nbytes]

    return state, record


def _sizes(state: Any) -> dict[str, int]:
    """Bytes of each storage that a state's tensors lie in."""
    values = state.values() if isinstance(state, dict) else ()
    return {value.storage.key: value.storage.nbytes for value in values if isinstance(value, View)}


def _tensors(state: dict[Any, Any], record: Callable[[Storage], Bytes], size: int) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    storages: dict[Storage, Array] = {}
    # a tensor that does not lie in order is copied, and many may lie in one storage
    spare = size
    for name, value in state.items():
        view = _checked(name, value)
        if view.storage not in storages:
            content = record(view.storage)
            if len(content) != view.storage.nbytes:
                raise CheckpointError(f"{name} claims more values than the file holds; download it again")
            storages[view.storage] = np.frombuffer(content, _BITS[view.storage.dtype])
        flat = storages[view.storage][view.offset :]
        steps = tuple(step * flat.itemsize for step in view.strides)
        bits = np.lib.stride_tricks.as_strided(flat, view.shape, steps, writeable=False)
        if not bits.flags.c_contiguous:
            spare -= bits.nbytes
            if spare < 0:
                raise CheckpointError(f"{name} claims more values than the file holds; download it again")
            bits = np.ascontiguousarray(bits)
        found[name] = Tensor(DTYPES[view.storage.dtype], bits)
    return found


def _checked(name: object, value: Any) -> View:
    """A dense float tensor within its storage; anything else is refused."""
    if not isinstance(name, str):
        raise CheckpointError(f"found the key {name!r}; expected tensor names")
    if not isinstance(value, View) or value.storage.dtype not in DTYPES:
        kind = value.storage if isinstance(value, View) else value
        what = f"torch.{kind.dtype}" if isinstance(kind, (Storage, Other)) else type(value).__name__
        raise CheckpointError(f"{name} is {what}; expected a dense tensor of {', '.join(DTYPES)}")
    count, last = 1, value.offset
    for size, step in zip(value.shape, value.strides, strict=True):
        count *= size
        last += (size - 1) * step
    beyond = last >= value.storage.count if count else value.offset > value.storage.count
    if count > value.storage.count or beyond or len(value.shape) > _MOST_DIMENSIONS:
        raise CheckpointError(f"{name} claims more values than the file holds; download it again")
    return value


def _refusal(error: Refused) -> str:
    if error.asks:
        return f"asks for {error.asks}, expected plain tensors only; get the gates from a source you trust"
    return f"is not a whole torch file of plain tensors (it {error}); download it again"


def _to_torch(torch: Any, tensor: Tensor) -> Any:
    bits = np.array(tensor.bits, order="C")
    if tensor.dtype == "BF16":
        return torch.from_numpy(bits.view("<i2")).view(torch.bfloat16)
    return torch.from_numpy(bits)
