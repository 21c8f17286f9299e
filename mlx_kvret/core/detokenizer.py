"""The text of tokens as they come, the same on every backend."""

from __future__ import annotations

from collections.abc import Callable, Sequence

INCOMPLETE = "\N{REPLACEMENT CHARACTER}"


class Detokenizer:
    """In all, what a tokenizer's ``decode`` makes of all tokens together.

    A token's text depends on what stands before it: a word's space is dropped at a beginning, and a character
    may be of several tokens. So a token is decoded behind the ones that were told last, whose text is taken
    off again, and waits while its last character is not whole.
    """

    def __init__(self, decode: Callable[[list[int]], str]) -> None:
        self._decode = decode
        # tokens told last, and those that wait
        self._told: list[int] = []
        self._waiting: list[int] = []

    def add(self, token: int) -> str:
        """What has become certain with one more token."""
        self._waiting.append(token)
        return self._text(all_of_it=False)

    def end(self) -> str:
        """What still waited."""
        return self._text(all_of_it=True)

    def _text(self, all_of_it: bool) -> str:
        if not self._waiting:
            return ""
        before = self._decode(self._told) if self._told else ""
        after = self._decode([*self._told, *self._waiting])
        if not all_of_it and (len(after) <= len(before) or after.endswith(INCOMPLETE)):
            return ""
        self._told, self._waiting = self._waiting, []
        return after[len(before) :]


def token_texts(ids: Sequence[int], decode: Callable[[list[int]], str]) -> list[str]:
    """The text of each token, which joined are the text of all; nothing for a part of a character."""
    text = Detokenizer(decode)
    found = [text.add(token) for token in ids]
    if found:
        found[-1] += text.end()
    return found
