"""RoPE settings reach the model: what its config means is put under mlx-lm's names, and then verified.

Several of mlx-lm's model files do not read what transformers 5 nests in ``rope_parameters``, or know some
kinds of RoPE only. So what each attention layer really applies is measured. :func:`fitted` mends a model that
differs from its config; :func:`check` refuses it.

What a config means is told by transformers' own configuration class where it knows the model. Of other
models, and of one that ``mlx_lm.load`` opened, the settings are read as they stand.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.nn as nn
from mlx_lm.utils import load_config

from ..core.fingerprint import text_config
from ..core.rope import Rope
from ..errors import ConfigError, UnsupportedModelError
from .hooks import attention_modules, language_model
from .rotation import FixedRoPE, applies, dims_of, is_traditional, rotary_modules
from .vision import is_vision

Loader = Callable[..., tuple[nn.Module, dict[str, Any]]]
# families whose transformers code rotates a part of each head; others would ignore the factor
PARTIAL = (
    "glm", "glm4", "glm4_moe", "glm4_moe_lite", "gpt_neox", "laguna", "mellum", "mimo_v2_flash",
    "minimax_m2", "nemotron", "phi", "phi3", "qwen3_5", "qwen3_5_moe", "qwen3_5_text", "qwen3_5_moe_text",
    "qwen3_next", "recurrent_gemma", "solar_open", "stablelm",
)  # fmt: skip
# text has one position a token, on which these have no effect
_OF_IMAGES = ("mrope_section", "mrope_interleaved")


@dataclass(frozen=True)
class Understood:
    """What a config says about RoPE: one for all layers, or one by kind of layer."""

    name: str
    ropes: Mapping[str, Rope]
    layer_types: tuple[str, ...]
    no_rope: tuple[int, ...]
    by_transformers: bool

    def of_layer(self, index: int) -> Rope | None:
        """The RoPE of a layer; None if it has none, or nothing is said about it."""
        if index in self.no_rope:
            return None
        if "" in self.ropes:
            return self.ropes[""]
        return self.ropes.get(self.layer_types[index]) if index < len(self.layer_types) else None

    @property
    def main(self) -> Rope | None:
        """The RoPE of layers with full attention."""
        return self.ropes.get("") or self.ropes.get("full_attention")

    @property
    def local(self) -> Rope | None:
        """The RoPE of sliding-window layers, if theirs is another one."""
        return self.ropes.get("sliding_attention")


def understand(config: Mapping[str, Any]) -> Understood:
    """What a model's ``config.json``, or the arguments of a loaded model, say about RoPE."""
    stored = copy.deepcopy(dict(config))
    found = _by_transformers(stored)
    text: Any = text_config(stored) if found is None else found
    name = str(text.get("model_type") or config.get("model_type") or "unknown")
    stated = _stated(text)
    kinds = {kind: own for kind, own in stated.items() if isinstance(own, dict)}
    width = text.get("qk_rope_head_dim") or text.get("head_dim")
    if not width and text.get("hidden_size") and text.get("num_attention_heads"):
        width = text["hidden_size"] // text["num_attention_heads"]
    most = text.get("max_position_embeddings")
    part, rotated = stated.get("partial_rotary_factor"), text.get("qk_rope_head_dim")
    if part and rotated and int((text.get("qk_head_dim") or text.get("head_dim") or 0) * part) == rotated:
        # the same said twice
        del stated["partial_rotary_factor"]
    if not stated or not isinstance(width, int):
        kinds, stated = {}, {}
    widths = {"full_attention": text.get("global_head_dim") or width}
    ropes = {
        kind: Rope(name, own, widths.get(kind, width), most if isinstance(most, int) else 2**31)
        for kind, own in (kinds or ({"": stated} if stated else {})).items()
    }
    rotates = text.get("no_rope_layers") or ()
    without = tuple(index for index, flag in enumerate(rotates) if not flag)
    return Understood(name, ropes, tuple(text.get("layer_types") or ()), without, found is not None)


def loaded(
    load: Loader, folder: Path, stored: Mapping[str, Any], length: int | None = None, **options: Any
) -> tuple[nn.Module, dict[str, Any]]:
    """A model that mlx-lm's ``load_model`` opened, with the RoPE its config means, and that config.

    Args:
        stored: what ``config.json`` holds; ``options`` are those of ``load``.
        length: as for :func:`fitted`.

    Raises:
        UnsupportedModelError, ConfigError: as :func:`fitted`; whatever ``load`` raises.
    """
    given = options.pop("model_config", None) or {}
    # mlx-lm reads numbers such as infinity that JSON has no form for
    meant = {**stored, **load_config(folder), **given}
    said = understand(meant)
    ways = [_flat(said, meant)]
    if (plain := _plain(said, meant)) is not None:
        # a kind that can be put in afterwards: some files refuse it, and mlx-lm's longrope drops how the
        # model pairs numbers
        ways.insert(0 if said.main is not None and said.main.kind == "longrope" else 1, plain)
    for way, changes in enumerate(ways, 1):
        try:
            network, config = load(folder, model_config=given | changes, **options)
            break
        except (ValueError, TypeError, KeyError, AttributeError, AssertionError):
            if way == len(ways):
                raise
    # the names that mlx-lm reads are none of the model's config
    config = {key: value for key, value in config.items() if key not in changes or key in meant}
    config |= {key: meant[key] for key in changes if key in meant}
    fitted(network, meant, length)
    return network, config


def _flat(said: Understood, config: Mapping[str, Any]) -> dict[str, Any]:
    """RoPE settings under the names that mlx-lm's files read, for fields that a config lacks."""
    found: dict[str, Any] = {}
    if said.main is not None:
        own = said.main.settings
        theta, part = own.get("rope_theta"), own.get("partial_rotary_factor")
        found = {"rope_theta": theta, "rotary_emb_base": theta}
        found |= {"partial_rotary_factor": part, "rotary_pct": part}
        found["rotary_dim"] = said.main.rotation().dims if part else None
        if said.main.kind != "default":
            found["rope_scaling"] = dict(own) | {"type": said.main.kind}
    if said.local is not None:
        theta = said.local.settings.get("rope_theta")
        found |= {"rope_local_base_freq": theta, "swa_rope_theta": theta}
    inner = text_config(dict(config))
    missing = {k: v for k, v in found.items() if v is not None and inner.get(k) is None}
    # some files want the field to be there
    return _within(config, {"rope_scaling": inner.get("rope_scaling")} | missing)


def _plain(said: Understood, config: Mapping[str, Any]) -> dict[str, Any] | None:
    """Settings of plain RoPE; None where they are plain, or where more depends on them than the rotation."""
    if said.main is None or said.main.kind == "default" or said.main.settings.get("mscale_all_dim"):
        return None
    theta = said.main.settings.get("rope_theta")
    changes = {"rope_scaling": None, "rope_parameters": {"rope_type": "default", "rope_theta": theta}}
    return _within(config, _flat(said, config) | changes)


def _within(config: Mapping[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Changes at the place where the text model's settings stand."""
    inner = text_config(dict(config))
    return {"text_config": inner | changes} if isinstance(config.get("text_config"), dict) else changes


def fitted(model: nn.Module, config: Mapping[str, Any], length: int | None = None) -> None:
    """Have every layer of a loaded model apply what its config says.

    Args:
        length: tokens expected in all, for models whose frequencies depend on it; by default their full
            length.

    Raises:
        UnsupportedModelError: a setting that nothing reads, or that cannot be applied.
        ConfigError: a length for a model to which it means nothing.
    """
    said = understand(config)
    fixed = _fixed(said, model, length)
    for attention, name, module, rope in _layers(model, said):
        wanted = rope.rotation(dims_of(module), length)
        if applies(module, wanted, rope.head_dim):
            continue
        if not said.by_transformers:
            raise _differs(rope, module, "use another model")
        made = FixedRoPE(wanted, is_traditional(module))
        # an own module of the file, whose pairs are not known
        if type(module).__module__ not in _KNOWN or not applies(made, wanted, rope.head_dim):
            raise _differs(rope, module, "use another model")
        setattr(attention, name, made)
    model.__dict__["_kvret_rope"] = fixed


def check(model: nn.Module) -> None:
    """Verify a model that was opened elsewhere against the arguments it keeps.

    Fields of its config that mlx-lm drops are not seen here: :func:`mlx_kvret.load` sees all. A model that
    went through :func:`fitted` is right.

    Raises:
        UnsupportedModelError: a layer applies something else than its settings say.
    """
    args = getattr(model, "args", None)
    # mlx-vlm's models have positions of their own make, given from outside
    if args is None or is_vision(model) or "_kvret_rope" in model.__dict__:
        return
    config = {name: value for name, value in vars(args).items() if value is not None}
    if "rope_scaling" in vars(args) and not config.keys() & {"rope_scaling", "rope_parameters"}:
        # the file reads the field, and a default of transformers is not what it applies
        config["rope_scaling"] = {"rope_type": "default", "type": "default"}
    said = understand(config)
    fixed = _fixed(said, model, None)
    for _, _, module, rope in _layers(model, said):
        if not applies(module, rope.rotation(dims_of(module)), rope.head_dim):
            raise _differs(rope, module, "open it with mlx_kvret.load, which mends what it can")
    if fixed is not None:
        model.__dict__["_kvret_rope"] = fixed


def mark(model: nn.Module) -> str:
    """What tells apart caches of a model whose frequencies are fixed to a length; empty for all others."""
    fixed = model.__dict__.get("_kvret_rope")
    return "" if fixed is None else f" rope_length={fixed}"


_KNOWN = ("mlx.nn.layers.positional_encoding", "mlx_lm.models.rope_utils")


def _fixed(said: Understood, model: nn.Module, length: int | None) -> int | None:
    """Check all settings; the length to which frequencies are fixed."""
    if length is not None and not said.ropes:
        raise ConfigError(
            f"rope_length has no effect on {said.name} models, which say nothing of RoPE; drop it"
        )
    extra = _read_by(model, said)
    for rope in said.ropes.values():
        rope.check_keys(extra)
    depending = [rope for rope in said.ropes.values() if rope.depends_on_length]
    for rope in depending or list(said.ropes.values())[:1]:
        fixed = rope.fixed_length(length)
    return fixed if said.ropes else None


def _read_by(model: nn.Module, said: Understood) -> Collection[str]:
    """Settings beside those of the kind of RoPE that the model's code reads."""
    # of the file that defines it, which need not be a module that was imported by name
    call = inspect.unwrap(type(language_model(model)).__call__)
    try:
        source = Path(call.__code__.co_filename).read_text(encoding="utf-8")
    except (OSError, ValueError):
        source = ""
    named = {key for rope in said.ropes.values() for key in rope.settings if f'"{key}"' in source}
    named -= {"partial_rotary_factor"}
    # transformers moves this one into every kind that was saved with it
    reads = ["original_max_position_embeddings"] if said.by_transformers else []
    if said.name in PARTIAL or (not said.by_transformers and "partial_rotary_factor" in source):
        reads.append("partial_rotary_factor")
    return {*named, *reads, *_OF_IMAGES}


def _layers(model: nn.Module, said: Understood) -> Iterator[tuple[nn.Module, str, nn.Module, Rope]]:
    """Each attention that rotates: itself, its rotating module and that one's name, and what it should do."""
    found = False
    for index, layer in enumerate(language_model(model).layers):
        rope = said.of_layer(index)
        for attention in attention_modules(layer):
            for name, module in rotary_modules(attention):
                found = True
                if rope is not None:
                    yield attention, name, module, rope
    if not found and (main := said.main) is not None and set(main.settings) > {"rope_theta", "rope_type"}:
        raise UnsupportedModelError(
            f"{said.name} models with rope_type {main.kind} cannot be bounded: their attention has no RoPE "
            "that could be verified; use another model"
        )


def _differs(rope: Rope, module: Any, mend: str) -> UnsupportedModelError:
    said = {key: value for key, value in rope.settings.items() if not isinstance(value, (list, tuple))}
    return UnsupportedModelError(
        f"{rope.name} models with the RoPE settings {said} cannot be bounded: mlx-lm's "
        f"{type(module).__name__} applies something else; {mend}"
    )


def _by_transformers(config: dict[str, Any]) -> dict[str, Any] | None:
    """The text model's config as transformers understands it; None if it does not know the model."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    if config.get("model_type") not in CONFIG_MAPPING:
        return None
    try:
        found = CONFIG_MAPPING[config["model_type"]].from_dict(copy.deepcopy(config)).get_text_config()
    except Exception:
        # whatever a class of transformers raises about a config that mlx-lm can read
        return None
    read: dict[str, Any] = found.to_dict()
    return read


def _stated(text: Mapping[str, Any]) -> dict[str, Any]:
    """RoPE settings in transformers' present form."""
    nested = text.get("rope_parameters")
    stated = dict(nested) if isinstance(nested, dict) else dict(text.get("rope_scaling") or {})
    if any(isinstance(value, dict) for value in stated.values()):
        return stated
    for key in ("rope_theta", "partial_rotary_factor"):
        if text.get(key) is not None:
            stated.setdefault(key, text[key])
    return stated if stated.get("rope_theta") is not None else {}
