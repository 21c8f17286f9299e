"""State dicts in torch files (.pth), read without running anything that is in them."""

from __future__ import annotations

import io
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from mlx_kvret.core.tensors import Tensor
from mlx_kvret.errors import CheckpointError, MissingDependencyError

_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def read_state(path: Path) -> dict[str, Tensor]:
    """The tensors of a state dict, bits unchanged.

    Raises:
        CheckpointError: missing, damaged, not a state dict of float tensors, or it asks for code to run.
        MissingDependencyError: torch is not installed.
    """
    torch = _torch()
    try:
        # weights_only: a pickle may call any function; this loader knows tensors and containers only
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} does not exist; a trimkv folder needs this file") from error
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error
    except Exception as error:  # a damaged pickle can raise nearly anything
        raise CheckpointError(
            f"{path} is not a whole torch file of plain tensors, nothing in it was executed "
            f"({str(error).splitlines()[0] if str(error) else type(error).__name__}); download it again"
        ) from error
    if not isinstance(state, dict):
        raise CheckpointError(f"{path} holds a {type(state).__name__}; expected a state dict of tensors")
    return {_name(path, name): _from_torch(torch, path, name, value) for name, value in state.items()}


def write_state(path: Path, tensors: dict[str, Tensor]) -> None:
    """Save a state dict. Names that share a :class:`Tensor` share their storage in the file, too."""
    torch = _torch()
    made = {id(tensor): _to_torch(torch, tensor) for tensor in tensors.values()}
    # torch reports a full disk as RuntimeError, a plain write as OSError
    buffer = io.BytesIO()
    torch.save({name: made[id(tensor)] for name, tensor in tensors.items()}, buffer)
    path.write_bytes(buffer.getbuffer())


def _torch() -> ModuleType:
    try:
        import torch
    except ImportError as error:
        raise MissingDependencyError(
            "trimkv gates are torch files and torch is not installed; run `pip install torch`"
        ) from error
    return torch


def _name(path: Path, name: object) -> str:
    if not isinstance(name, str):
        raise CheckpointError(f"{path} has the key {name!r}; expected tensor names")
    return name


def _from_torch(torch: Any, path: Path, name: str, value: Any) -> Tensor:
    kinds = {getattr(torch, theirs): ours for ours, theirs in _DTYPES.items()}
    if not isinstance(value, torch.Tensor) or value.layout is not torch.strided or value.dtype not in kinds:
        what = getattr(value, "dtype", type(value).__name__)
        raise CheckpointError(f"{name} in {path} is {what}; expected a {', '.join(_DTYPES.values())} tensor")
    if value.numel() * value.element_size() > value.untyped_storage().nbytes():
        raise CheckpointError(f"{name} in {path} claims more values than the file holds; download it again")
    value = value.detach().contiguous()
    if kinds[value.dtype] == "BF16":
        return Tensor("BF16", value.view(torch.int16).numpy().view("<u2"))
    return Tensor(kinds[value.dtype], value.numpy())


def _to_torch(torch: Any, tensor: Tensor) -> Any:
    bits = np.array(tensor.bits, order="C")
    if tensor.dtype == "BF16":
        return torch.from_numpy(bits.view("<i2")).view(torch.bfloat16)
    return torch.from_numpy(bits)
