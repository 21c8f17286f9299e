"""A gate folder from one form to another, and what that changes."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_kvret.core.checkpoint import (
    GateCheckpoint,
    save_gates,
)
from mlx_kvret.core.files import require_free
from mlx_kvret.core.installed import command_for, installed
from mlx_kvret.core.model_folder import model_config
from mlx_kvret.errors import CheckpointError, ConfigError, MissingDependencyError, UnsupportedModelError

from . import torch_form, trimkv
from .casting import cast
from .forms import FORMS, detect, load_any, need_mlx

if TYPE_CHECKING:
    from mlx_kvret.evaluation.gate_agreement import Agreement, Gates


@dataclass(frozen=True)
class Conversion:
    """What was written. A tied tensor counts once; ``agreement`` is there only if values changed."""

    src: Path
    src_form: str
    dst: Path
    dst_form: str
    tensors: int
    nbytes: int
    agreement: Agreement | None = None
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        size = f"{self.nbytes / 1e6:.1f} MB" if self.nbytes >= 1e6 else f"{self.nbytes / 1e3:.0f} kB"
        return "\n".join(
            [
                f"{self.src_form} → {self.dst_form}: {self.tensors} tensors, {size} in {self.dst}",
                str(self.agreement or "lossless: every value is unchanged"),
                *(f"note: {note}" for note in self.notes),
            ]
        )


def convert(
    src: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    to: str,
    *,
    dtype: str | None = None,
    bits: int | None = None,
    model: str | os.PathLike[str] | None = None,
    prompt: str | None = None,
) -> Conversion:
    """Convert a gate folder; ``dst`` appears whole or not at all.

    Args:
        to: the form to write.
        dtype: float32, bfloat16 or float16 for all tensors; None keeps each tensor's type.
        bits: 8 to quantise (mlx only).
        model: folder of the base model. The gates are checked against it. A trimkv folder carries its
            config, so it is needed for gates that were never in that form. If values change, the agreement
            is measured in it, and without it on synthetic inputs.
        prompt: the text to measure on, instead of the one that comes with the package.

    Raises:
        ConfigError: an option that cannot work or has no effect, or ``dst`` cannot be written.
        CheckpointError: ``src`` or ``model`` cannot be used.
        ModelMismatchError: the gates belong to another base model than ``model``.
        MissingDependencyError: the mlx form needs mlx, writing a trimkv folder needs torch.
    """
    if to not in FORMS:
        raise ConfigError(f"cannot convert to {to!r}; expected one of {', '.join(FORMS)}")
    if bits is not None and to != "mlx":
        raise ConfigError(f"bits has no effect on the {to} form; drop it or convert to mlx")
    if prompt is not None and model is None:
        raise ConfigError("a prompt is measured in the base model; give its folder as model as well")
    target, form, source = require_free(dst), detect(src), load_any(src)
    base = None
    if model is not None:
        base = model_config(Path(model).expanduser())
        source.check_model(base, str(model))

    result = source if dtype is None else cast(source, dtype)
    changed = bits is not None or _changed(source, result)
    if to == "mlx":
        need_mlx()
        from . import mlx_form

        gates = mlx_form.to_mlx(result, bits)
        agreement = _agreement(source, gates, model, prompt) if changed else None
        mlx_form.save_mlx(target, gates, result.provenance)
    else:
        agreement = _agreement(source, _gates(result), model, prompt) if changed else None
        if to == "trimkv":
            trimkv.save_trimkv(target, result, base)
        elif to == "torch":
            torch_form.save_torch(target, result)
        else:
            save_gates(target, result.config, result.tensors, result.provenance)
    return Conversion(
        src=Path(src),
        src_form=form,
        dst=target,
        dst_form=to,
        tensors=len(source.tensors),
        nbytes=sum(file.stat().st_size for file in target.iterdir()),
        agreement=agreement,
        notes=_notes(source),
    )


def _changed(source: GateCheckpoint, result: GateCheckpoint) -> bool:
    return any((source.tensors[name].float32() != t.float32()).any() for name, t in result.tensors.items())


def _agreement(
    source: GateCheckpoint,
    gates: Gates,
    model: str | os.PathLike[str] | None,
    prompt: str | None,
) -> Agreement:
    from mlx_kvret.evaluation.gate_agreement import agreement, synthetic_inputs

    reference, why = _gates(source), "no base model was given"
    if model is not None:
        try:
            inputs = _prompt_inputs(model, reference, prompt)
        except (CheckpointError, ConfigError, UnsupportedModelError, MissingDependencyError) as error:
            if prompt is not None:
                raise
            why = str(error)
        else:
            return agreement(reference, gates, inputs.items(), f"a prompt in {model}")
    return agreement(reference, gates, synthetic_inputs(source.config), f"synthetic inputs, no prompt: {why}")


def _prompt_inputs(model: str | os.PathLike[str], gates: Gates, prompt: str | None) -> dict[int, Any]:
    if not installed("mlx"):
        raise MissingDependencyError(
            f"reading a prompt in a base model needs mlx; run `{command_for('mlx')}`"
        )
    from mlx_kvret.evaluation.gate_inputs import prompt_inputs

    return prompt_inputs(model, gates, prompt)  # type: ignore[arg-type]


def _gates(checkpoint: GateCheckpoint) -> Gates:
    """Gates that run, on MLX if it is installed."""
    if installed("mlx"):
        from mlx_kvret.mlx_backend.gates import from_checkpoint

        return from_checkpoint(checkpoint)
    if not installed("torch"):
        raise MissingDependencyError(
            "a conversion that changes values is measured by running the gates, which needs mlx or torch; "
            f"run `{command_for('mlx')}` or `{command_for('torch')}`"
        )
    from mlx_kvret.cuda_backend.gates import from_checkpoint as from_checkpoint_on_torch

    return from_checkpoint_on_torch(checkpoint)


def _notes(source: GateCheckpoint) -> tuple[str, ...]:
    """What a reader of the source should know of it."""
    notes = []
    kept = source.provenance.get("trimkv")
    if isinstance(kept, dict) and "note" in kept:
        notes.append(str(kept["note"]))
    if stored := source.provenance.get("dequantized_from"):
        notes.append(f"the weights of the large maps have been through 8 bits ({stored})")
    return tuple(notes)
