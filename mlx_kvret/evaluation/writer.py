"""From text to samples for any tokenizer: a text is a list of pieces, each tokenised on its own.

So the tokens of a piece that holds the answer are known, whatever the tokenizer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ..core.loading import reading_tokenizer
from ..errors import ConfigError
from .samples import Metric, Question, Sample, Turn

_MARK = "@@text@@"


@dataclass(frozen=True)
class Piece:
    """Some text; ``useful`` if the answer stands in it."""

    text: str
    useful: bool = False


class Writer:
    """Encodes with a tokenizer's begin token, or as the user's turn of its chat template.

    Raises:
        ConfigError: no tokenizer, or ``chat`` and a tokenizer without a usable template.
    """

    def __init__(self, tokenizer: Any, chat: bool = False) -> None:
        if tokenizer is None:
            raise ConfigError("this model has no tokenizer, so only tasks in token ids can be run on it")
        self._tokenizer = tokenizer
        self.before, self._after = self._start(), ""
        if chat:
            if not getattr(tokenizer, "chat_template", None):
                raise ConfigError("the tokenizer has no chat template; drop --chat")
            try:
                shown = tokenizer.apply_chat_template(
                    [{"role": "user", "content": _MARK}], tokenize=False, add_generation_prompt=True
                )
            except Exception as error:  # templates are programs of the model's maker
                raise ConfigError(
                    f"the tokenizer's chat template refuses a user's text ({error}); drop --chat"
                ) from error
            if shown.count(_MARK) != 1:
                raise ConfigError(
                    "the tokenizer's chat template does not show the user's text once; drop --chat"
                )
            before, self._after = shown.split(_MARK)
            self.before = self.encode(before)

    def _start(self) -> tuple[int, ...]:
        first = self._tokenizer.bos_token_id
        begun = list(self._tokenizer.encode("a"))
        return (first,) if first is not None and begun[:1] == [first] else ()

    def encode(self, text: str) -> tuple[int, ...]:
        """Tokens of a text, without special ones."""
        with reading_tokenizer("the model"):
            return tuple(self._tokenizer.encode(text, add_special_tokens=False))

    def read(self, pieces: Sequence[Piece], start: int) -> tuple[tuple[int, ...], list[tuple[int, ...]]]:
        """Tokens of the pieces, and the positions of each useful one if the first token's is ``start``."""
        ids, useful = list[int](), list[tuple[int, ...]]()
        for piece in pieces:
            tokens = self.encode(piece.text)
            if piece.useful:
                useful.append(tuple(range(start + len(ids), start + len(ids) + len(tokens))))
            ids += tokens
        return tuple(ids), useful

    def question(
        self,
        asked: str,
        references: Sequence[str],
        metric: Metric = "all",
        max_tokens: int = 32,
        useful: Sequence[tuple[int, ...]] = (),
    ) -> Question:
        """A question, up to where the answer begins."""
        places = tuple(place for piece in useful for place in piece)
        return Question(self.encode(asked + self._after), (), tuple(references), metric, max_tokens, places)

    def sample(
        self,
        pieces: Sequence[Piece],
        asked: str,
        references: Sequence[str],
        metric: Metric = "all",
        max_tokens: int = 32,
    ) -> Sample:
        """The pieces, then a question about them."""
        ids, useful = self.read(pieces, len(self.before))
        question = self.question(asked, references, metric, max_tokens, useful)
        return Sample((Turn(self.before + ids, (question,)),))

    def fill(
        self, pieces: Sequence[Piece], noise: Callable[[], str], length: int, place: Callable[[int], int]
    ) -> list[Piece]:
        """The pieces among as much noise as makes ``length`` tokens or a little less, in random places.

        ``place(n)`` draws one of n places; pieces stay in their order.

        Raises:
            ConfigError: the pieces alone are longer.
        """
        left = length - len(self.before) - sum(len(self.encode(piece.text)) for piece in pieces)
        if left < 0:
            raise ConfigError(f"length is {length}; this task needs {length - left} tokens or more")
        around: list[Piece] = []
        while True:
            text = noise()
            left -= len(self.encode(text))
            if left < 0:
                break
            around.append(Piece(text))
        cuts = sorted(place(len(around) + 1) for _ in pieces)
        out: list[Piece] = []
        for start, end, piece in zip([0, *cuts], [*cuts, len(around)], [*pieces, None], strict=True):
            out += around[start:end] + ([piece] if piece else [])
        return out
