"""What a model reads next in a conversation: token ids, from its chat template and from what was said.

A cache holds token ids and forgets nothing but what it evicts, so nothing may be read twice, nothing be left
open, and no answer be replaced by what a template makes of it (thoughts dropped, white space trimmed). What
must be read is therefore never found by comparing texts. The conversation is rendered with a placeholder for
every answer; what follows the last placeholder closes that answer, states the new message and opens the next
answer, whatever the template did to the rest.

Pure logic: the only thing it asks for is a tokenizer (:mod:`.chat_template`).
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from .chat_template import Message, Template, check_text
from .errors import CacheError, CheckpointError, ConfigError

# plain words, so that no template and no filter has a reason to change them
_ANSWER, _USER, _SYSTEM = "Quorvexa", "Brimlotu", "Zandofik"
# that begin differently: what is encoded alike before all of them is so before whatever comes; the last one
# is for tokenizers that know only some words
_NEXT = ("Vexalim", "Tombrika", "")
# between a text that was read and what is asked about it
BETWEEN = "\n\n"


@dataclass(frozen=True)
class Turn:
    """A user's turn: what the model has to read until it answers.

    ``ids`` follow what the transcript holds; the first ``start`` of them have been read already, by a turn
    that was broken off. ``ids[:head]`` close the last answer and open the turn, ``ids[tail:]`` close it and
    open the answer. An ``open`` turn is a text that was read and that the next message joins, so its
    ``ids[tail:]`` are not read with it. ``lead`` is the part of ``text`` that was read before in this way.
    """

    text: str
    ids: list[int]
    head: int
    tail: int
    start: int = 0
    open: bool = False
    lead: str = ""

    @property
    def end(self) -> int:
        """How many of ``ids`` are read."""
        return self.tail if self.open else len(self.ids)

    @property
    def new(self) -> list[int]:
        """Token ids to read now."""
        return self.ids[self.start : self.end]


class Transcript:
    """A conversation as messages and as the token ids that are in a cache.

    ``messages`` are an optional system message, then users' and assistant's in turn. :meth:`plan` says what
    to read for a new turn, :meth:`plan_text` for a text that the next turn joins; they change nothing that a
    failure would have to undo, and :meth:`account` is told what came of it.

    Raises:
        ConfigError: no chat template, one that is broken, or one that does not take the system message.
    """

    def __init__(self, tokenizer: Any, system: str | None = None) -> None:
        self.template = tokenizer if isinstance(tokenizer, Template) else Template(tokenizer)
        self.messages: list[Message] = [] if system is None else [{"role": "system", "content": system}]
        self.context: list[int] = []
        # said, or begun by a turn that was broken off, and not in the cache yet
        self._owed: list[int] = []
        # the stop token that ended the last answer
        self._stop: int | None = None
        self._begun: tuple[Turn, int] | None = None
        self._check_system()

    def __len__(self) -> int:
        """Tokens in the cache."""
        return len(self.context) + (self._begun[1] if self._begun else 0)

    @property
    def system(self) -> str | None:
        """The system message."""
        first = self.messages[:1]
        return first[0]["content"] if first and first[0]["role"] == "system" else None

    @property
    def ids(self) -> list[int]:
        """What the cache has read, in order."""
        return self.context + (self._begun[0].ids[: self._begun[1]] if self._begun else [])

    def copy(self) -> Transcript:
        """One that goes on by itself."""
        twin = copy.copy(self)
        twin.messages, twin.context, twin._owed = list(self.messages), list(self.context), list(self._owed)
        return twin

    def _check_system(self) -> None:
        user, system = {"role": "user", "content": _USER}, {"role": "system", "content": _SYSTEM}
        shown = self.template.render([*([] if self.system is None else [system]), user])
        if self.system is not None and _SYSTEM not in shown:
            raise ConfigError(
                "the model's chat template drops the system message; leave it out (--system-prompt) and put "
                "its text in front of the first message"
            )

    # ---------------------------------------------------------------- a turn

    def plan(self, text: str) -> Turn:
        """What must be read so that the model answers ``text``.

        Raises:
            ConfigError: the template refuses; the transcript is as before.
        """
        return self._behind(text, Transcript._plan)

    def plan_text(self, text: str) -> Turn:
        """What must be read of a text about which something will be asked; the next message joins it.

        Raises:
            ConfigError: the template refuses; the transcript is as before.
        """
        return self._behind(text, Transcript._plan_open)

    def _behind(self, text: str, plan: Callable[[Transcript, str], Turn]) -> Turn:
        """A turn that goes on with what was begun, if it can; else that is over."""
        turn = plan(self, text)
        if self._begun is None:
            return turn
        begun, read = self._begun
        complete = begun.open and read == begun.end
        leads = [begun.text if complete else begun.lead]
        if begun.open and not complete and (cut := self._cut()):
            leads.append(cut)
        same = max(read - begun.head, 0)
        for lead in leads:
            if lead:
                turn = plan(self, f"{lead}{BETWEEN}{text.lstrip()}")
            rest = turn.ids[turn.head + same : turn.end]
            if rest and turn.ids[turn.head :][:same] == begun.ids[begun.head :][:same]:
                # the text begins as what was read of the last one
                ids = begun.ids[: begun.head + same] + turn.ids[turn.head + same :]
                tail = turn.tail + begun.head - turn.head
                return replace(turn, ids=ids, head=begun.head, tail=tail, start=read, lead=lead)
        closed = self._closed()
        turn = plan(closed, text)
        vars(self).update(vars(closed))
        return turn

    def account(self, turn: Turn, read: int, said: Sequence[int], text: str, stopped: bool) -> None:
        """Take in what came of a turn.

        Args:
            read: tokens by which the cache has grown.
            said: tokens of the answer, its stop token among them.
            text: the answer as it was shown.
            stopped: whether the last of ``said`` is a stop token; else the answer was cut.

        Raises:
            CacheError: the cache holds tokens that nobody knows.
        """
        if not said:
            done = min(turn.start + read, turn.end)
            self._begun = (turn, done) if done else None
        else:
            known = turn.new + list(said)
            self.messages += [
                {"role": "user", "content": turn.text},
                {"role": "assistant", "content": text},
            ]
            self.context += turn.ids[: turn.start] + known[:read]
            self._owed, self._begun = known[read:], None
            self._stop = said[-1] if stopped else None
        if read > len(turn.new) + len(said):
            raise CacheError(
                f"the cache has read {read} tokens where the conversation has {len(turn.new) + len(said)}; "
                "begin a new one"
            )

    def _closed(self) -> Transcript:
        """A copy in which a turn that was broken off is over: the text cut where reading ended, no answer."""
        twin = self.copy()
        if self._begun is None:
            return twin
        turn, read = self._begun
        twin._owed = turn.ids[read : turn.head] + turn.ids[max(read, turn.tail) :]
        twin.context += turn.ids[:read]
        twin.messages += [{"role": "user", "content": self._cut()}, {"role": "assistant", "content": ""}]
        twin._begun = twin._stop = None
        return twin

    def _cut(self) -> str:
        """What was read of a message that was broken off."""
        assert self._begun is not None
        turn, read = self._begun
        return self.template.decode(turn.ids[turn.head : min(read, turn.tail)])

    def _plan(self, text: str) -> Turn:
        check_text(text)
        first = not self.messages or self.messages[-1]["role"] == "system"
        anchor, word = "" if first else self._word(_ANSWER, text), self._word(_USER, text)
        history = self.messages if first else self._history(anchor)
        whole = self._after(anchor, [*history, {"role": "user", "content": text}])
        probe = self._after(anchor, [*history, {"role": "user", "content": word}])
        before, found, after = probe.partition(word)
        if not found:
            raise ConfigError("the model's chat template does not show the user's message; mend the template")
        if whole[len(before) : len(whole) - len(after)].strip() == text.strip():
            # a template may tell the time, which has gone on since
            before = whole[: len(before)]
        ids = self._encode(anchor, whole, before, text, after)
        opening = self.template.encode_after(anchor, before)
        ending = self.template.encode_after(_USER, after)
        head = _common(ids, opening)
        tail = len(ids) - min(_common(ids[::-1], ending[::-1]), len(ids) - head)
        if not first and self._stop is not None:
            # the model has closed its answer itself, if not quite as the template would
            done = opening.index(self._stop) + 1 if self._stop in opening else 0
            if done <= head:
                ids, head, tail = ids[done:], head - done, tail - done
        owed = self._owed
        return Turn(text, owed + ids, len(owed) + head, len(owed) + tail)

    def _plan_open(self, text: str) -> Turn:
        """A text up to where it is encoded alike whatever follows, and how its message would end."""
        one, *others = (self._plan(text + BETWEEN + (word and self._word(word, text))) for word in _NEXT)
        end = one.head + min(_common(one.ids[one.head :], other.ids[other.head :]) for other in others)
        return Turn(text, one.ids[:end] + one.ids[one.tail :], one.head, end, open=True)

    def _history(self, word: str) -> list[Message]:
        """The messages with a placeholder for each answer, and without what the template would repeat."""
        history = [
            {"role": "assistant", "content": word} if m["role"] == "assistant" else m for m in self.messages
        ]
        if history[0]["role"] != "system":
            return history
        system = self._word(_SYSTEM)
        user = {"role": "user", "content": self._word(_USER)}
        # some templates put the system text in front of the newest message
        repeated = system in self._after(word, [{"role": "system", "content": system}, *history[1:], user])
        return history[1:] if repeated else history

    def _after(self, word: str, messages: list[Message]) -> str:
        rendered = self.template.render(messages)
        _, found, after = rendered.rpartition(word) if word else ("", word, rendered)
        if word and not found:
            raise ConfigError(
                "the model's chat template does not show earlier answers, so that nothing can be added to a "
                "conversation; ask with `mlx-kvret generate`"
            )
        return after

    def _encode(self, anchor: str, whole: str, before: str, text: str, after: str) -> list[int]:
        """Token ids of a turn; control tokens in the user's own text are text."""
        template = self.template
        if not template.holds_control(text):
            return template.encode_after(anchor, whole)
        own = whole[len(before) : len(whole) - len(after)]
        if whole != before + own + after:
            raise ConfigError(
                "the message spells control tokens of this model, and its chat template writes something "
                "else around it than around other messages, so that they cannot be told from the template's "
                "own; leave them out"
            )
        opened, closed = template.encode_after(anchor, before), template.encode_after(_USER, after)
        return opened + template.encode(own, plainly=True) + closed

    def _word(self, word: str, *texts: str) -> str:
        """A placeholder that occurs in no message."""
        while any(word in text for text in (*(m["content"] for m in self.messages), *texts)):
            word += word[-2:]
        return word

    # ---------------------------------------------------------------- beside a saved cache

    def notes(self) -> dict[str, str]:
        """What :meth:`resumed` needs, as texts to be saved beside the cache."""
        state: dict[str, Any] = {
            "context": self.context,
            "owed": self._owed,
            "stop": self._stop,
            "begun": None,
        }
        if self._begun is not None:
            turn, read = self._begun
            state["begun"] = {
                "text": turn.text, "ids": turn.ids, "head": turn.head, "tail": turn.tail, "read": read,
                "open": turn.open, "lead": turn.lead,
            }  # fmt: skip
        return {"messages": json.dumps(self.messages), "tokens": json.dumps(state)}

    @classmethod
    def resumed(cls, tokenizer: Any, notes: Mapping[str, str], seen: int) -> Transcript:
        """The transcript of a saved cache that has seen so many tokens.

        Raises:
            CheckpointError: the notes are not a conversation's, are damaged, or of another cache.
            ConfigError: the tokenizer's chat template does not take the conversation's system message.
        """
        if "messages" not in notes or "tokens" not in notes:
            raise CheckpointError("the file holds a cache but no conversation; give one that /save wrote")
        found = cls(tokenizer)
        try:
            found._restore(json.loads(notes["messages"]), json.loads(notes["tokens"]))
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise CheckpointError("the conversation beside the cache is damaged; save it again") from error
        if len(found) != seen:
            raise CheckpointError(
                f"the conversation beside the cache has {len(found)} tokens, not {seen}; save it again"
            )
        found._check_system()
        return found

    def _restore(self, messages: Any, state: Any) -> None:
        """Take over what was saved; a ValueError, TypeError or KeyError if it is not that."""
        begun = state["begun"]
        if begun is not None:
            # earlier files have no open turns
            turn = Turn(
                _text(begun["text"]), _ids(begun["ids"]), begun["head"], begun["tail"],
                open=begun.get("open", False) is True, lead=_text(begun.get("lead", "")),
            )  # fmt: skip
            read, size = begun["read"], len(turn.ids)
            _ids([turn.head, turn.tail, read])
            if not (turn.head <= turn.tail <= size and 0 < read <= turn.end):
                raise ValueError("a turn that was broken off ends before it begins")
            self._begun = turn, read
        self.messages = [{"role": _text(m["role"]), "content": _text(m["content"])} for m in messages]
        turns = [m["role"] for m in self.messages[self.system is not None :]]
        if turns != ["user", "assistant"] * (len(turns) // 2):
            raise ValueError("the roles do not take turns")
        self.context, self._owed = _ids(state["context"]), _ids(state["owed"])
        self._stop = None if state["stop"] is None else _ids([state["stop"]])[0]
        if bool(turns) != bool(self.context):
            raise ValueError("messages without tokens, or tokens without messages")


def _ids(found: Any) -> list[int]:
    if not isinstance(found, list) or not all(type(i) is int and 0 <= i < 2**31 for i in found):
        raise ValueError("no token ids")
    return found


def _text(found: Any) -> str:
    if not isinstance(found, str):
        raise ValueError("no text")
    return found


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the common beginning."""
    return next((n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
