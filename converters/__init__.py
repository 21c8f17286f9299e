"""Gate checkpoints from one form to another.

``shared``  one folder for every backend (safetensors + json), the form in the middle
``mlx``     the same for MLX alone: one float type, or 8 bits
``trimkv``  gates as TRIM-KV and DBTrimKV release them (torch)
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mlx_kvret.core.checkpoint import (
    CONFIG_FILE,
    GateCheckpoint,
    load_gates,
    read_json,
    read_manifest,
    save_gates,
)
from mlx_kvret.core.files import require_free
from mlx_kvret.errors import CheckpointError, ConfigError

from . import trimkv
from .casting import cast

if TYPE_CHECKING:
    from mlx_kvret.gates import RetentionGates

    from .agreement import Agreement

__all__ = ["FORMS", "Conversion", "convert", "detect", "load_any"]

FORMS = ("shared", "mlx", "trimkv")


@dataclass(frozen=True)
class Conversion:
    """What was written. A tied tensor counts once; ``agreement`` has rows only if values changed."""

    src: Path
    src_form: str
    dst: Path
    dst_form: str
    tensors: int
    nbytes: int
    agreement: tuple[Agreement, ...] = ()
    note: str = ""

    def __str__(self) -> str:
        size = f"{self.nbytes / 1e6:.1f} MB"
        lines = [f"{self.src_form} → {self.dst_form}: {self.tensors} tensors, {size} in {self.dst}"]
        if self.agreement:
            first = self.agreement[0]
            where = "synthetic inputs, not a prompt" if first.synthetic else "a prompt"
            lines.append(f"kept entries that agree with the source ({first.tokens} tokens, {where}):")
            lines += [f"  budget {row.budget:>5}  {row.share:.2%}" for row in self.agreement]
        else:
            lines.append("lossless: every value is unchanged")
        return "\n".join([*lines, *([f"note: {self.note}"] if self.note else [])])


def detect(folder: str | os.PathLike[str]) -> str:
    """The form of a gate folder, ``"shared"``, ``"mlx"`` or ``"trimkv"``.

    Raises:
        CheckpointError: no folder, none of the forms, or two of them at once.
    """
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder; expected one with retention gates")
    ours, theirs = (folder / CONFIG_FILE).exists(), (folder / trimkv.WEIGHT_FILE).exists()
    if ours and theirs:
        raise CheckpointError(
            f"{folder} holds {CONFIG_FILE} and {trimkv.WEIGHT_FILE}; keep one form in a folder"
        )
    if theirs:
        return "trimkv"
    if not ours:
        raise CheckpointError(
            f"{folder} holds no retention gates; expected {CONFIG_FILE} (shared, mlx) or "
            f"{trimkv.WEIGHT_FILE} (trimkv)"
        )
    form = read_manifest(folder)[2]
    if form not in ("shared", "mlx"):
        raise CheckpointError(f"{folder} has form {form!r}; expected 'shared' or 'mlx'")
    return form


def load_any(folder: str | os.PathLike[str]) -> GateCheckpoint:
    """Gates from a shared or a trimkv folder, exactly as they are stored there."""
    return trimkv.load_trimkv(folder) if detect(folder) == "trimkv" else load_gates(folder)


def convert(
    src: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    to: str,
    *,
    dtype: str | None = None,
    bits: int | None = None,
    model: str | os.PathLike[str] | None = None,
) -> Conversion:
    """Convert a gate folder; ``dst`` appears whole or not at all.

    Args:
        to: the form to write.
        dtype: float32, bfloat16 or float16 for all tensors; None keeps each tensor's type.
        bits: 8 to quantise (mlx only).
        model: folder of the base model, whose config a trimkv folder carries (trimkv only); needed for
            gates that were never in that form, and in place of the kept config for those that were.

    Raises:
        ConfigError: an option that cannot work or has no effect, or ``dst`` cannot be written.
        CheckpointError: ``src`` cannot be used.
        ModelMismatchError: the gates belong to another base model than ``model``.
    """
    _check_options(to, bits, model)
    target, form = require_free(dst), detect(src)
    source = _load(src, form)
    base = read_json(Path(model).expanduser() / trimkv.CONFIG_FILE) if model is not None else None

    result = cast(source, dtype) if dtype else source
    if to == "mlx":
        from . import mlx_form

        gates = mlx_form.to_mlx(result, bits=bits)
        rows = _agreement(source, gates) if bits or _changed(source, result) else ()
        mlx_form.save_mlx(target, gates, source.provenance)
    else:
        rows = _agreement(source, _gates(result)) if _changed(source, result) else ()
        if to == "trimkv":
            trimkv.save_trimkv(target, result, base)
        else:
            save_gates(target, result.config, dict(result.tensors), result.provenance)
    kept = source.provenance.get("trimkv")
    return Conversion(
        src=Path(src),
        src_form=form,
        dst=target,
        dst_form=to,
        tensors=len(source.tensors),
        nbytes=sum(file.stat().st_size for file in target.iterdir()),
        agreement=rows,
        note=str(kept.get("note", "")) if isinstance(kept, dict) else "",
    )


def _check_options(to: str, bits: int | None, model: object) -> None:
    if to not in FORMS:
        raise ConfigError(f"cannot convert to {to!r}; expected one of {', '.join(FORMS)}")
    for name, value, only in (("bits", bits, "mlx"), ("model", model, "trimkv")):
        if value is not None and to != only:
            raise ConfigError(f"{name} has no effect on the {to} form; drop it or convert to {only}")


def _load(folder: str | os.PathLike[str], form: str) -> GateCheckpoint:
    if form != "mlx":
        return load_any(folder)
    from .mlx_form import load_mlx

    return load_mlx(folder)


def _changed(source: GateCheckpoint, result: GateCheckpoint) -> bool:
    return any((source.tensors[name].float32() != t.float32()).any() for name, t in result.tensors.items())


def _agreement(source: GateCheckpoint, gates: RetentionGates) -> tuple[Agreement, ...]:
    from .agreement import agreements

    return agreements(_gates(source), gates)


def _gates(checkpoint: GateCheckpoint) -> RetentionGates:
    from mlx_kvret.gates import from_checkpoint

    return from_checkpoint(checkpoint)
