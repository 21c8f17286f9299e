"""Rotary position embeddings as numbers: what the RoPE settings of a config do to a head.

The formulas and their names are those of transformers (``rope_parameters``); backends compare what a loaded
model applies with what stands here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import ConfigError, UnsupportedModelError

Floats = npt.NDArray[np.float64]

# kinds whose frequencies depend on how long the text is
BY_LENGTH = ("longrope", "dynamic")
_UNFIXED = {
    (
        "phimoe",
        "longrope",
    ): "their scale changes with the length apart from the frequencies, which mlx-lm and "
    "transformers choose differently"
}
_SAME = {"su": "longrope", "deepseek_yarn": "yarn", "telechat3-yarn": "yarn", "mrope": "default"}
_KEYS = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": (
        "factor", "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow", "mscale",
        "mscale_all_dim", "truncate",
    ),
    "longrope": (
        "factor", "original_max_position_embeddings", "attention_factor", "short_factor", "long_factor",
    ),
    "llama3": ("factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"),
    "proportional": ("factor", "partial_rotary_factor"),
}  # fmt: skip


@dataclass(frozen=True)
class Rotation:
    """Pair i of the first ``dims`` numbers of a head turns by ``frequencies[i]`` radians a token.

    ``scale`` multiplies the rotated numbers. The others stay as they are.
    """

    frequencies: Floats
    scale: float = 1.0

    @property
    def dims(self) -> int:
        return 2 * len(self.frequencies)


@dataclass(frozen=True)
class Rope:
    """The RoPE of one kind of layer of a model: settings, width of a head, and the model's full length."""

    name: str
    settings: Mapping[str, Any]
    head_dim: int
    max_positions: int

    @property
    def kind(self) -> str:
        kind = str(self.settings.get("rope_type") or self.settings.get("type") or "default")
        return _SAME.get(kind, kind)

    @property
    def depends_on_length(self) -> bool:
        return self.kind in BY_LENGTH and not self.settings.get("alpha")

    def check_keys(self, extra: Collection[str]) -> None:
        """Refuse settings that nothing here or in the model's file (``extra``) reads.

        Raises:
            UnsupportedModelError: names the model and the setting.
        """
        if self.kind not in _KEYS:
            raise UnsupportedModelError(
                f"{self.name} models with rope_type {self.kind!r} cannot be bounded: expected one of "
                f"{', '.join(_KEYS)}; use another model"
            )
        known = {"rope_type", "type", "rope_theta", *_KEYS[self.kind], *extra}
        for key, value in self.settings.items():
            whole = key == "partial_rotary_factor" and value == 1
            if value is not None and key not in known and not whole:
                raise UnsupportedModelError(
                    f"{self.name} models with the RoPE setting {key} = {value!r} (rope_type {self.kind}) "
                    "cannot be bounded: nothing reads it, so positions would be wrong; remove it from "
                    "config.json if it has no meaning, or use another model"
                )

    def fixed_length(self, length: int | None) -> int | None:
        """The length that tells apart frequencies that depend on it; None where none do.

        Raises:
            ConfigError: a length that is none, or for a model whose frequencies do not depend on it.
            UnsupportedModelError: no length where there is no default, or no length can be fixed.
        """
        if why := _UNFIXED.get((self.name, self.kind)):
            raise UnsupportedModelError(
                f"{self.name} models with rope_type {self.kind} cannot be bounded: {why}; use another model"
            )
        if not self.depends_on_length:
            if length is not None:
                raise ConfigError(
                    f"rope_length has no effect on {self.name} models with rope_type {self.kind}; drop it"
                )
            return None
        if length is not None and length < 1:
            raise ConfigError(f"rope_length is {length}; expected a number of tokens")
        if self.kind == "dynamic":
            if length is None:
                raise UnsupportedModelError(
                    f"{self.name} models with rope_type dynamic cannot be bounded as they are: their "
                    f"frequencies change with every token beyond {self.max_positions}, while cached keys "
                    "keep old ones; load with rope_length=N, the tokens you expect in all, to fix them"
                )
            return max(length, self.max_positions)
        original = int(self._number("original_max_position_embeddings"))
        return self.max_positions if (length or self.max_positions) > original else original

    def rotation(self, dims: int | None = None, length: int | None = None) -> Rotation:
        """What the settings mean.

        Args:
            dims: numbers of a head that are rotated, where ``partial_rotary_factor`` does not say.
            length: tokens expected in all; by default ``max_positions``.

        Raises:
            UnsupportedModelError: a setting is missing or no number.
        """
        partial = self.settings.get("partial_rotary_factor")
        if partial is not None and self.kind != "proportional":
            dims = int(self.head_dim * self._number("partial_rotary_factor"))
        dims = dims or self.head_dim
        return _KINDS[self.kind](self, dims, length)

    def _number(self, key: str) -> float:
        value = self.settings.get(key)
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not math.isfinite(value):
            raise UnsupportedModelError(
                f"the RoPE setting {key} of this {self.name} model is {value!r} (rope_type {self.kind}); "
                "expected a number, mend config.json"
            )
        return float(value)

    def _optional(self, key: str, default: float) -> float:
        return default if self.settings.get(key) is None else self._number(key)

    def _periods(self, dims: int, stretch: float = 1.0) -> Floats:
        """1 / frequency of each pair (dims / 2,) of plain RoPE."""
        base = self._number("rope_theta") * stretch
        return np.asarray(base ** (np.arange(0, dims, 2, dtype=np.float64) / dims))


def _default(rope: Rope, dims: int, length: int | None) -> Rotation:
    return Rotation(1 / rope._periods(dims))


def _linear(rope: Rope, dims: int, length: int | None) -> Rotation:
    return Rotation(1 / (rope._periods(dims) * rope._number("factor")))


def _dynamic(rope: Rope, dims: int, length: int | None) -> Rotation:
    factor, most = rope._number("factor"), rope.max_positions
    if rope.settings.get("alpha"):
        # a fixed stretch under the same name
        ratio = rope._number("alpha")
    else:
        ratio = factor * max(length or most, most) / most - (factor - 1)
    return Rotation(1 / rope._periods(dims, ratio ** (dims / (dims - 2))))


def _yarn(rope: Rope, dims: int, length: int | None) -> Rotation:
    original, theta = rope._number("original_max_position_embeddings"), rope._number("rope_theta")
    factor = rope._optional("factor", rope.max_positions / original)

    def grown(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1 if factor > 1 else 1.0

    mscale, all_dim = rope._optional("mscale", 0), rope._optional("mscale_all_dim", 0)
    usual = grown(mscale) / grown(all_dim) if mscale and all_dim else grown(1)

    def pair(rotations: float) -> float:
        return dims * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low, high = pair(rope._optional("beta_fast", 0) or 32), pair(rope._optional("beta_slow", 0) or 1)
    truncate = rope.settings.get("truncate")
    if truncate is None or truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dims - 1)
    ramp = np.clip((np.arange(dims // 2) - low) / ((high - low) or 0.001), 0, 1)
    periods = rope._periods(dims)
    return Rotation(
        ramp / (factor * periods) + (1 - ramp) / periods, rope._optional("attention_factor", usual)
    )


def _longrope(rope: Rope, dims: int, length: int | None) -> Rotation:
    original = rope._number("original_max_position_embeddings")
    factor = rope._optional("factor", rope.max_positions / original)
    usual = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    which = "long_factor" if (length or rope.max_positions) > original else "short_factor"
    stretch = rope.settings.get(which)
    if not isinstance(stretch, (list, tuple)) or len(stretch) != dims // 2:
        raise UnsupportedModelError(
            f"the RoPE setting {which} of this {rope.name} model is {stretch!r}; expected a list of "
            f"{dims // 2} numbers, mend config.json"
        )
    periods = np.array(stretch, np.float64) * rope._periods(dims)
    return Rotation(1 / periods, rope._optional("attention_factor", usual))


def _llama3(rope: Rope, dims: int, length: int | None) -> Rotation:
    factor, original = rope._number("factor"), rope._number("original_max_position_embeddings")
    low, high = rope._number("low_freq_factor"), rope._number("high_freq_factor")
    frequencies = 1 / rope._periods(dims)
    # turns within the original length: few are interpolated, many stay, in between is blended
    turns = original * frequencies / (2 * math.pi)
    blend = np.clip((turns - low) / (high - low), 0, 1)
    return Rotation((1 - blend) * frequencies / factor + blend * frequencies)


def _proportional(rope: Rope, dims: int, length: int | None) -> Rotation:
    turning = int(rope._optional("partial_rotary_factor", 1) * rope.head_dim // 2)
    frequencies = 1 / (rope._periods(rope.head_dim) * rope._optional("factor", 1))
    frequencies[turning:] = 0
    return Rotation(frequencies)


_KINDS: dict[str, Callable[[Rope, int, int | None], Rotation]] = {
    "default": _default,
    "linear": _linear,
    "dynamic": _dynamic,
    "yarn": _yarn,
    "longrope": _longrope,
    "llama3": _llama3,
    "proportional": _proportional,
}
