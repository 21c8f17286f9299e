"""State dicts in torch files (.pth), read without running anything that is in them."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np

from mlx_kvret.core.tensors import Tensor
from mlx_kvret.errors import CheckpointError, MissingDependencyError

from .casting import DTYPES

# before it, even a load of weights only could be made to run code (CVE-2025-32434)
SAFE_TORCH = (2, 6)


def read_state(path: Path) -> dict[str, Tensor]:
    """The tensors of a state dict, bits unchanged.

    Raises:
        CheckpointError: missing, damaged, not a state dict of float tensors, or it asks for code to run.
        MissingDependencyError: torch is not installed, or too old to be safe.
    """
    torch = _torch()
    try:
        content = io.BytesIO(path.read_bytes())
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} does not exist; a trimkv folder needs this file") from error
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # a pickle may call any function; a load of weights only knows tensors and containers
            state = torch.load(content, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle can raise nearly anything
        raise CheckpointError(f"{path} {_refusal(error)}; nothing in it was executed") from error
    if not isinstance(state, dict):
        raise CheckpointError(f"{path} holds a {type(state).__name__}; expected a state dict of tensors")
    try:
        return {name: _from_torch(torch, name, value) for name, value in state.items()}
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error


def write_state(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Save a state dict. Names that share a :class:`Tensor` share their storage in the file, too."""
    torch = _torch()
    made = {id(tensor): _to_torch(torch, tensor) for tensor in tensors.values()}
    # torch reports a full disk as RuntimeError, a plain write as OSError
    buffer = io.BytesIO()
    torch.save({name: made[id(tensor)] for name, tensor in tensors.items()}, buffer)
    path.write_bytes(buffer.getbuffer())


def _torch() -> Any:
    try:
        import torch
    except ImportError as error:
        raise MissingDependencyError(
            "trimkv gates are torch files and torch is not installed; run `pip install torch`"
        ) from error
    if tuple(map(int, re.findall(r"\d+", torch.__version__)[:2])) < SAFE_TORCH:
        raise MissingDependencyError(
            f"torch {torch.__version__} cannot open torch files safely; run `pip install -U torch`"
        )
    return torch


def _refusal(error: Exception) -> str:
    # torch's own text advises to load the file unsafely
    asks = re.search(r"GLOBAL ([\w.]+)", str(error)) if isinstance(error, UnpicklingError) else None
    if asks:
        return f"asks for {asks[1]}, expected plain tensors only; get the gates from a source you trust"
    return "is not a whole torch file of plain tensors; download it again"


def _from_torch(torch: Any, name: object, value: Any) -> Tensor:
    if not isinstance(name, str):
        raise CheckpointError(f"found the key {name!r}; expected tensor names")
    codes = {getattr(torch, dtype): code for dtype, code in DTYPES.items()}
    plain = isinstance(value, torch.Tensor) and value.layout is torch.strided and value.device.type == "cpu"
    if not plain or value.dtype not in codes:
        what = getattr(value, "dtype", type(value).__name__)
        raise CheckpointError(f"{name} is {what}; expected a dense tensor of {', '.join(DTYPES)}")
    if value.numel() * value.element_size() > value.untyped_storage().nbytes():
        raise CheckpointError(f"{name} claims more values than the file holds; download it again")
    value, code = value.detach().contiguous(), codes[value.dtype]
    return Tensor(code, value.view(torch.int16).numpy().view("<u2") if code == "BF16" else value.numpy())


def _to_torch(torch: Any, tensor: Tensor) -> Any:
    bits = np.array(tensor.bits, order="C")
    if tensor.dtype == "BF16":
        return torch.from_numpy(bits.view("<i2")).view(torch.bfloat16)
    return torch.from_numpy(bits)
