"""How the next token is drawn, checked once for every backend, under the names of mlx-lm's sampler makers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import ConfigError
from .options import MAX_SEED, number, of_type, short, whole

# beyond this, float16 logits would overflow and nothing would be left to draw from
MOST_BIAS = 1e4
# kinds of penalties, and how strong they may be
PENALTIES = {
    "repetition": ("0 (none) or a number from 0.01 to 100", 0.01, 100.0),
    "presence": ("a number from -100 to 100", -100.0, 100.0),
    "frequency": ("a number from -100 to 100", -100.0, 100.0),
}
# what only matters where tokens are drawn
_DRAWS = ("top_p", "seed", "min_p", "min_tokens_to_keep", "top_k", "xtc_probability", "xtc_threshold",
          "xtc_special_tokens")  # fmt: skip


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn. On MLX tokens are left out before the temperature is applied, as mlx-lm
    does; on torch after it, as transformers does: at a ``temp`` of 1 both are the same.

    Args:
        temp: temperature; 0 takes the likeliest token.
        top_p: draw from the likeliest tokens that have this much probability together; 1 is all.
        seed: makes the draws repeatable.
        min_p: leave out tokens that are less likely than this share of the likeliest; 0 is none.
        min_tokens_to_keep: how many of the likeliest ``min_p`` leaves in any case.
        top_k: draw from this many of the likeliest tokens; 0 is all.
        xtc_probability: how often the likeliest choices are excluded: all tokens above ``xtc_threshold`` but
            the least likely of them.
        xtc_threshold: a probability, from 0 to 0.5.
        xtc_special_tokens: token ids that are never excluded.
        logit_bias: what is added to the logits of some token ids.
        repetition_penalty: divides the logits above 0 of tokens that stand among the last
            ``repetition_context_size`` of this call's prompt and answer, and multiplies those below; None, 0
            and 1 do nothing.
        presence_penalty: is taken off the logits of such tokens.
        frequency_penalty: is taken off as often as they stand there.
    """

    temp: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    min_p: float = 0.0
    min_tokens_to_keep: int = 1
    top_k: int = 0
    xtc_probability: float = 0.0
    xtc_threshold: float = 0.1
    xtc_special_tokens: Sequence[int] | None = None
    logit_bias: Mapping[int, float] | None = None
    repetition_penalty: float | None = None
    repetition_context_size: int = 20
    presence_penalty: float | None = None
    presence_context_size: int = 20
    frequency_penalty: float | None = None
    frequency_context_size: int = 20

    def __post_init__(self) -> None:
        self._check_draws()
        self._check_logits()
        if self.temp == 0 and (idle := self._given(_DRAWS)):
            raise ConfigError(
                f"{idle[-1]} has no effect with a temp of 0, which always takes the likeliest token; "
                f"drop it, or give a temp such as 0.7 (the random policy's own seed is policy_seed)"
            )
        self._needs("min_tokens_to_keep", "min_p", self.min_p)
        for name in ("xtc_threshold", "xtc_special_tokens"):
            self._needs(name, "xtc_probability", self.xtc_probability)
        for kind in PENALTIES:
            self._needs(f"{kind}_context_size", f"{kind}_penalty", getattr(self, f"{kind}_penalty"))

    def _check_draws(self) -> None:
        number("temp", self.temp, "0 (greedy) or a number from 1e-30 to 1e30", 0, 1e30)
        if 0 < self.temp < 1e-30:
            raise ConfigError(f"temp is {self.temp}; expected 0 (greedy) or a number from 1e-30 to 1e30")
        # float32 sums of probabilities tell no smaller share from nothing
        number("top_p", self.top_p, "a number from 0.001 to 1 (all tokens)", 1e-3, 1)
        if self.seed is not None:
            whole("seed", self.seed, 0, MAX_SEED)
        number("min_p", self.min_p, "a number from 0 (no token is left out) to 1", 0, 1)
        whole("min_tokens_to_keep", self.min_tokens_to_keep, 1)
        whole("top_k", self.top_k, 0)
        number("xtc_probability", self.xtc_probability, "a number from 0 (never) to 1", 0, 1)
        number("xtc_threshold", self.xtc_threshold, "a number from 0 to 0.5", 0, 0.5)
        if self.xtc_special_tokens is not None:
            of_type("xtc_special_tokens", self.xtc_special_tokens, (list, tuple), "a list of token ids")
            _check_ids("xtc_special_tokens", self.xtc_special_tokens)

    def _check_logits(self) -> None:
        if self.logit_bias is not None:
            of_type("logit_bias", self.logit_bias, Mapping, "a dictionary of token ids and what is added")
            _check_ids("logit_bias", self.logit_bias)
            for token, added in self.logit_bias.items():
                wanted = f"a number from -{MOST_BIAS:.0f} to {MOST_BIAS:.0f}"
                number(f"the logit_bias of token {token}", added, wanted, -MOST_BIAS, MOST_BIAS)
        for kind, (wanted, low, high) in PENALTIES.items():
            strength = getattr(self, f"{kind}_penalty")
            if strength is not None:
                number(f"{kind}_penalty", strength, wanted, 0 if strength == 0 else low, high)
            whole(f"{kind}_context_size", getattr(self, f"{kind}_context_size"), 1)

    def _given(self, names: Iterable[str]) -> list[str]:
        """Those of the names whose values are not the defaults."""
        return [name for name in names if getattr(self, name) != getattr(Sampling, name)]

    def _needs(self, name: str, other: str, there: Any) -> None:
        if not there and self._given([name]):
            raise ConfigError(f"{name} has no effect without {other}; drop it, or give {other} too")

    @property
    def asked(self) -> list[str]:
        """What was asked for of the drawing itself, by name; a sampler of one's own takes its place."""
        return self._given(("temp", *_DRAWS))

    def penalties(self) -> Iterator[tuple[str, float, int]]:
        """The penalties that do something: their kind, their strength and how many tokens they look back."""
        for kind in PENALTIES:
            strength = getattr(self, f"{kind}_penalty")
            if strength and (kind, strength) != ("repetition", 1):
                yield kind, float(strength), getattr(self, f"{kind}_context_size")

    def check_vocabulary(self, size: int | None) -> None:
        """Refuse token ids that a model of so many has not."""
        for name in ("logit_bias", "xtc_special_tokens"):
            high = max(getattr(self, name) or (0,))
            if size is not None and high >= size:
                raise ConfigError(f"{name} holds token id {high}, the model's are 0 to {size - 1}; drop it")


SAMPLING = tuple(field.name for field in dataclasses.fields(Sampling))


def split_sampling(options: Mapping[str, Any]) -> tuple[Sampling, dict[str, Any]]:
    """How tokens are drawn, and all other options of a generation."""
    own = {name: value for name, value in options.items() if name in SAMPLING}
    return Sampling(**own), {name: value for name, value in options.items() if name not in own}


def drawing(
    asked: Sampling,
    vocabulary: int | None,
    sampler_of: Callable[[Sampling], Any],
    processors_of: Callable[[Sampling], list[Any]],
    others: Sequence[Any] | None = None,
) -> dict[str, Any]:
    """Options of a backend's loop: what draws tokens if any are drawn, and processors of logits, ours first.

    Args:
        sampler_of, processors_of: the backend's makers of both.
    """
    asked.check_vocabulary(vocabulary)
    draw, made = sampler_of(asked), processors_of(asked)
    found: dict[str, Any] = {} if draw is None else {"sampler": draw}
    return found | ({"logits_processors": [*made, *(others or ())]} if made else {})


def _check_ids(name: str, ids: Iterable[Any]) -> None:
    for token in ids:
        if not isinstance(token, int) or isinstance(token, bool) or token < 0:
            raise ConfigError(f"{name} holds {short(token)} where a token id should be; give whole numbers")
