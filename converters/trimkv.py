"""Released TRIM-KV and DBTrimKV gates (arXiv 2512.03324, 2605.09649) from and to the shared checkpoint.

A trimkv folder holds ``config.json`` (the base model's, with gate fields) and ``trimkv_weights.pth`` with
``{prefix}layers.{l}.self_attn.retention_gate.{name}`` for every layer, tied or not. The shared checkpoint
stores tied tensors once. Nothing is lost: the config, the prefix and the layers' numbers are kept in
``provenance["trimkv"]``, so that the way back gives every key and every bit again.
"""

from __future__ import annotations

import dataclasses
import os
import re
from pathlib import Path
from typing import Any

from mlx_kvret.core.checkpoint import GateCheckpoint, read_json, write_json
from mlx_kvret.core.config import GateConfig
from mlx_kvret.core.files import whole_folder
from mlx_kvret.core.tensors import Tensor
from mlx_kvret.errors import CheckpointError, ConfigError

from .torch_file import read_state, write_state
from .trimkv_config import (
    EVICTION,
    claims_tied,
    default_prefix,
    eviction_defaults,
    from_gate_config,
    gated_layers,
    to_gate_config,
)

CONFIG_FILE, WEIGHT_FILE = "config.json", "trimkv_weights.pth"
FALSELY_TIED = "config.json claims one last projection for all layers, the file has several: loaded untied"

_NAMES = {
    "rg": ("linear1.weight", "linear1.bias", "linear2.weight", "bias"),
    "rg10": ("linear1.weight", "linear1.bias", "linear2.weight", "linear2.bias", "linear3.weight", "bias"),
}
_KEY = re.compile(r"(|.*\.)layers\.(0|[1-9][0-9]{0,5})\.self_attn\.retention_gate\.(.+)")


def load_trimkv(folder: str | os.PathLike[str]) -> GateCheckpoint:
    """Read a trimkv folder.

    Raises:
        CheckpointError: damaged, unsafe, unknown or missing tensors, or the config contradicts them.
    """
    folder = Path(folder).expanduser()
    config = read_json(folder / CONFIG_FILE)
    state = read_state(folder / WEIGHT_FILE)
    try:
        return from_state(config, state)
    except CheckpointError as error:
        raise CheckpointError(f"{folder}: {error}") from error


def save_trimkv(
    folder: str | os.PathLike[str], checkpoint: GateCheckpoint, model: dict[str, Any] | None = None
) -> None:
    """Write a trimkv folder, whole or not at all.

    Args:
        model: the base model's config; without it the one kept in the provenance is used.

    Raises:
        ConfigError: neither is there, or the config describes other gates.
        ModelMismatchError: ``model`` is not the gates' base model.
        MissingDependencyError: torch is not installed.
    """
    config, state = to_state(checkpoint, model)
    with whole_folder(folder) as scratch:
        write_json(scratch / CONFIG_FILE, config)
        write_state(scratch / WEIGHT_FILE, state)


def from_state(config: dict[str, Any], state: dict[str, Tensor]) -> GateCheckpoint:
    """A checkpoint from the content of a trimkv folder."""
    prefix, gates = _by_layer(state)
    layers = sorted(gates)
    kind = "rg10" if "linear3.weight" in gates[layers[0]] else "rg"
    for layer in layers:
        if wrong := set(_NAMES[kind]) ^ gates[layer].keys():
            raise CheckpointError(
                f"layer {layer} has {', '.join(sorted(gates[layer]))}; a gate of kind {kind} has "
                f"{', '.join(_NAMES[kind])} (see {', '.join(sorted(wrong))})"
            )
    first = gates[layers[0]]
    maps, bias = first["linear1.weight"].shape, first["bias"].shape
    if len(maps) != 2 or len(bias) != 1:
        raise CheckpointError(
            f"linear1.weight has shape {maps} and bias {bias}; expected (h, hidden) and (H,)"
        )

    last = _NAMES[kind][-2:]
    same = all(_equal(gates[layer][name], first[name]) for layer in layers for name in last)
    tied = claims_tied(config)
    shared = same and tied
    gate_config = to_gate_config(
        config, kind=kind, layers=layers, kv_heads=bias[0], hidden_size=maps[1], width=maps[0],
        shared_projection=shared,
    )  # fmt: skip
    tensors = {f"shared.{name}": first[name] for name in last} if shared else {}
    for index, layer in enumerate(layers):
        for name, tensor in gates[layer].items():
            if not (shared and name in last):
                tensors[f"layers.{index}.{name}"] = tensor

    kept: dict[str, Any] = {"config": config, "prefix": prefix}
    if layers != list(range(len(layers))):
        kept["layers"] = layers
    # gates of kind rg never were tied, whatever their config says
    if tied and not same and kind == "rg10":
        kept["note"] = FALSELY_TIED
    return GateCheckpoint(gate_config, tensors, {"trimkv": kept})


def to_state(
    checkpoint: GateCheckpoint, model: dict[str, Any] | None = None
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The content of a trimkv folder: its config and its state dict. Raises as :func:`save_trimkv`."""
    gates = checkpoint.config
    if model is not None:
        checkpoint.check_model(model)
        config, prefix = from_gate_config(gates, model), default_prefix(model)
        layers = gated_layers(model, gates.layers)
    else:
        config, prefix, layers = _kept(checkpoint)
    state = {}
    for index, layer in enumerate(layers):
        for name in _NAMES[gates.kind]:
            own = f"layers.{index}.{name}"
            source = own if own in checkpoint.tensors else f"shared.{name}"
            state[f"{prefix}layers.{layer}.self_attn.retention_gate.{name}"] = checkpoint.tensors[source]
    _require_same(config, state, gates)
    return config, state


def _kept(checkpoint: GateCheckpoint) -> tuple[dict[str, Any], str, list[int]]:
    kept = checkpoint.provenance.get("trimkv")
    if not isinstance(kept, dict) or not isinstance(kept.get("config"), dict):
        raise ConfigError(
            "a trimkv folder needs the base model's config.json and these gates bring none; "
            "give the base model's folder as model"
        )
    layers = kept.get("layers", list(range(checkpoint.config.layers)))
    if not isinstance(layers, list) or len(layers) != checkpoint.config.layers:
        raise ConfigError(
            f"provenance.trimkv.layers is {layers!r}; expected {checkpoint.config.layers} layer numbers"
        )
    config, gates = kept["config"], checkpoint.config
    if eviction_defaults(config, gates.kind) != gates.eviction:
        config = config | {EVICTION: gates.eviction.to_dict() if gates.eviction else {}}
    return config, str(kept.get("prefix", "model.")), layers


def _require_same(config: dict[str, Any], state: dict[str, Tensor], gates: GateConfig) -> None:
    """Reading the result must give the same gates: config and tensors may come from different places."""
    try:
        again = from_state(config, state).config
    except CheckpointError as error:
        raise ConfigError(f"the base model's config does not fit these gates: {error}") from error
    again = dataclasses.replace(again, base_model=gates.base_model, base_fingerprint=gates.base_fingerprint)
    if wrong := [
        f"{field.name} {getattr(gates, field.name)!r} would be read as {getattr(again, field.name)!r}"
        for field in dataclasses.fields(gates)
        if getattr(gates, field.name) != getattr(again, field.name)
    ]:
        raise ConfigError(
            f"the base model's config does not fit these gates: {'; '.join(wrong)}; "
            "give the base model's folder as model"
        )


def _by_layer(state: dict[str, Tensor]) -> tuple[str, dict[int, dict[str, Tensor]]]:
    """The one prefix of all keys, and the tensors by layer and name within the gate."""
    gates: dict[int, dict[str, Tensor]] = {}
    prefixes, unknown = set(), []
    for key, tensor in state.items():
        match = _KEY.fullmatch(key)
        if match is None or match[3] not in _NAMES["rg10"]:
            unknown.append(key)
            continue
        prefixes.add(match[1])
        gates.setdefault(int(match[2]), {})[match[3]] = tensor
    if unknown:
        shown = ", ".join(unknown[:4]) + (f" and {len(unknown) - 4} more" if len(unknown) > 4 else "")
        raise CheckpointError(f"{WEIGHT_FILE} has tensors that are no part of a retention gate: {shown}")
    if not gates:
        raise CheckpointError(f"{WEIGHT_FILE} is empty; expected retention gates")
    if len(prefixes) > 1:
        raise CheckpointError(f"{WEIGHT_FILE} has gates of several models: {', '.join(sorted(prefixes))}")
    return prefixes.pop(), gates


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and a.bits.tobytes() == b.bits.tobytes()
