"""What a trimkv folder's ``config.json`` says about its gates, and how to write one.

It is the base model's config with further fields. Vision-language models nest those that shape the gate in
``text_config`` and keep the others at the top, so a field is looked up in both.
"""

from __future__ import annotations

import copy
from typing import Any

from mlx_kvret.core.config import ACTIVATIONS, EvictionDefaults, GateConfig
from mlx_kvret.core.fingerprint import fingerprint, text_config
from mlx_kvret.core.reading import exactly
from mlx_kvret.errors import CheckpointError, ConfigError

DEFAULT_BIAS = 18.0
# more than any model has: a loop over what a damaged file says must end
_MOST_LAYERS = 65_536
# ours: the authors' code looks at fields it knows
EVICTION = "kvret_eviction"
_ALIASES = {"swish": "silu", "gelu_new": "gelu_pytorch_tanh"}
_ATTENTION = ("full_attention", "attention")


def claims_tied(config: dict[str, Any]) -> bool:
    """Whether the last projection and the bias are said to be the same in every layer."""
    tied = _field(config, "tie_retention_gate_layers", True)
    if not isinstance(tied, bool):
        raise CheckpointError(f"tie_retention_gate_layers is {tied!r} in config.json; expected true or false")
    return tied


def to_gate_config(
    config: dict[str, Any], *, kind: str, layers: list[int], kv_heads: int, hidden_size: int, width: int,
    shared_projection: bool,
) -> GateConfig:  # fmt: skip
    """Join what the tensors say (the arguments) with what the config says.

    Raises:
        CheckpointError: the two contradict each other, or the activation is unknown.
    """
    text = text_config(config)
    stated = {
        "retention_gate": (_field(config, "retention_gate"), kind),
        "hidden_size": (text.get("hidden_size"), hidden_size),
        "num_key_value_heads": (text.get("num_key_value_heads"), kv_heads),
        "retention_gate_intermediate_size": (_field(config, "retention_gate_intermediate_size"), width),
    }
    if wrong := [
        f"{name} is {says!r} in config.json, {is_!r} in the tensors"
        for name, (says, is_) in stated.items()
        if says is not None and not exactly(says, is_)
    ]:
        raise CheckpointError(f"{'; '.join(wrong)}; the two files do not belong together")
    _check_layers(text, layers)
    bias = _field(config, "retention_gate_bias_init", DEFAULT_BIAS)
    if not _is_number(bias):
        raise CheckpointError(f"retention_gate_bias_init is {bias!r} in config.json; expected a number")
    memory = _field(config, "memory_size")
    # below 1 it is a share of the sequence, not a number of tokens
    whole = _is_number(memory) and memory >= 1 and float(memory).is_integer()
    try:
        return GateConfig(
            kind=kind,  # type: ignore[arg-type]
            layers=len(layers),
            kv_heads=kv_heads,
            hidden_size=hidden_size,
            width=width,
            activation=_activation(text),
            bias_init=float(bias),
            shared_projection=shared_projection,
            training_budget=int(memory) if whole else None,
            base_model=_field(config, "base_model") or "",
            base_fingerprint=fingerprint(config),
            eviction=eviction_defaults(config, kind),
        )
    except ConfigError as error:
        raise CheckpointError(str(error)) from error


def from_gate_config(gates: GateConfig, model: dict[str, Any]) -> dict[str, Any]:
    """The config of a trimkv folder for gates on this base model (its ``config.json``)."""
    config = copy.deepcopy(model)
    config |= {"global_capacity": gates.kind == "rg10", "base_model": gates.base_model}
    config[EVICTION] = gates.eviction.to_dict() if gates.eviction else {}
    if gates.training_budget is not None:
        config["memory_size"] = gates.training_budget
    text_config(config).update(
        retention_gate=gates.kind,
        retention_gate_intermediate_size=gates.width,
        retention_gate_bias_init=gates.bias_init,
        tie_retention_gate_layers=gates.shared_projection,
    )
    return config


def eviction_defaults(config: dict[str, Any], kind: str) -> EvictionDefaults | None:
    """How the gates want to be used. Released ones compete as they were trained to: over all heads, or each
    head by itself as the first ones (rg) were."""
    wishes = _field(config, EVICTION)
    if wishes is not None:
        return EvictionDefaults.from_dict(wishes) if wishes else None
    globally = bool(_field(config, "global_capacity", kind == "rg10"))
    return EvictionDefaults(scope="global" if globally else "head")


def default_prefix(config: dict[str, Any]) -> str:
    """Where a base model's config puts its decoder layers in the state dict."""
    return "model." if text_config(config) is config else "model.language_model."


def gated_layers(config: dict[str, Any], count: int) -> list[int]:
    """The model's indices of the layers that ``count`` gates belong to: all of them, or the attention layers.

    Raises:
        ConfigError: the model has another number of both.
    """
    text = text_config(config)
    full = _attention_layers(text)
    total = text.get("num_hidden_layers", count)
    if count == total:
        return list(range(count))
    if full is not None and count == len(full):
        return full
    raise ConfigError(
        f"there are gates for {count} layers, the model has {total}"
        + (f" of which {len(full)} are attention layers" if full is not None else "")
        + "; give the model the gates were trained for"
    )


def _check_layers(text: dict[str, Any], layers: list[int]) -> None:
    total = text.get("num_hidden_layers")
    if total is None:
        return
    if not isinstance(total, int) or isinstance(total, bool) or not 0 < total <= _MOST_LAYERS:
        raise CheckpointError(
            f"num_hidden_layers is {total!r} in config.json; expected a number from 1 to {_MOST_LAYERS}"
        )
    if beyond := [layer for layer in layers if layer >= total]:
        raise CheckpointError(f"there are gates for layer {beyond[0]}, config.json has {total} layers")
    full = _attention_layers(text)
    needed = range(total) if full is None else full
    if missing := sorted(set(needed) - set(layers)):
        raise CheckpointError(
            f"gates are missing for layers {', '.join(map(str, missing[:8]))}"
            f"{' …' if len(missing) > 8 else ''} of {total}; the file is incomplete, download it again"
        )


def _attention_layers(text: dict[str, Any]) -> list[int] | None:
    """Layers with full attention, where the config tells layers apart."""
    kinds = text.get("layer_types") or text.get("layers_block_type")
    if not isinstance(kinds, list):
        return None
    return [layer for layer, kind in enumerate(kinds) if kind in _ATTENTION]


def _activation(text: dict[str, Any]) -> str:
    name = text.get("hidden_act") or text.get("hidden_activation") or "silu"
    name = _ALIASES.get(name, name) if isinstance(name, str) else name
    if name not in ACTIVATIONS:
        raise CheckpointError(f"hidden_act is {name!r} in config.json; gates know {', '.join(ACTIVATIONS)}")
    return name


def _field(config: dict[str, Any], name: str, default: Any = None) -> Any:
    return text_config(config).get(name, config.get(name, default))


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
