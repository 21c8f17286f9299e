"""A conversation: a transcript, the cache that has read it, and the way back to before the last turn."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click

from ..conversation import Transcript, Turn
from ..core.detokenizer import Detokenizer
from ..core.plan import size
from ..errors import CacheError, ConfigError
from ..picture_template import SeeingTemplate
from ..reading import Reading, copied
from ..texts import read_picture, read_text
from .company import Company
from .screen import note, progress, show, speech
from .typed import COMMANDS, HELP, unquoted

_TAKES_FILE = {name.split()[0]: " " in name for name in COMMANDS}


class Stopped(Exception):
    """Ctrl-C between two chunks of a prompt."""


@dataclass
class Last:
    """The last message or file: what was there before, and what has come of it.

    ``cache`` and ``transcript`` are copies from before. ``base`` is the transcript in which ``turn`` was
    planned; ``said`` and ``answer`` are the tokens and the text of the answer so far, ``ended`` whether it
    ended by itself. ``text`` is None for a file; ``images`` went with it.
    """

    cache: Any
    transcript: Transcript
    text: str | None
    base: Transcript
    turn: Turn
    said: list[int] = field(default_factory=list)
    answer: str = ""
    ended: bool = False
    images: list[Any] = field(default_factory=list)


class Conversation:
    """A transcript, and the cache that has read it.

    Args:
        eviction: options of the cache.
        template: the chat template with settings of its own; the tokenizer's unless given.
        company: the processes that talk together; this one alone unless given.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        system: str | None,
        eviction: dict[str, Any],
        template: Any = None,
        company: Company | None = None,
    ) -> None:
        self.model, self.tokenizer, self.system, self.eviction = model, tokenizer, system, eviction
        self.template = tokenizer if template is None else template
        self.company = Company() if company is None else company
        self.reset()

    def reset(self) -> None:
        """Begin a new one."""
        from ..api import make_cache

        self.transcript = Transcript(self.template, self.system)
        self.cache = make_cache(self.model, **self.eviction)
        self.last: Last | None = None
        self.spoken: Any = None
        # pictures that go with the next message
        self.images: list[Any] = []

    def take(self, text: str, options: dict[str, Any]) -> bool:
        """What was typed: one of our commands, or text for the model. False ends the conversation."""
        name, *argument = text.split(maxsplit=1) if text.startswith("/") and "\n" not in text else [""]
        if name in _TAKES_FILE:
            return self.run(name, "".join(argument).rstrip(), options)
        if text.strip():
            self.turn(text, options)
        return True

    # ------------------------------------------------------------------ turns

    def turn(self, text: str, options: dict[str, Any]) -> None:
        """Read what is new, answer, and remember both; what was read before a failure is remembered too.

        Raises:
            ConfigError: the chat template refuses the turn; the conversation is as before.
            CacheError: the cache has read something else than the conversation.
        """
        images, self.images = self.images, []
        try:
            self.last = self._begin(text, lambda transcript, said: transcript.plan(self._shown(said, images)))
        except BaseException:
            self.images = images
            raise
        self.last.images = images
        self._speak(self.last.turn.new, options)

    def _shown(self, text: str, images: list[Any]) -> str:
        """A message with the marks of its pictures."""
        return self.template.show(images, text) if isinstance(self.template, SeeingTemplate) else text

    def picture(self, name: str) -> None:
        """Have a picture go with the next message.

        Raises:
            ConfigError: it cannot be read, or the model takes none.
        """
        from ..api import backend_of

        image = read_picture(name, "the picture")
        if not isinstance(self.template, SeeingTemplate):
            self.template = SeeingTemplate(self.template, self.model, self.tokenizer, backend_of(self.model))
            self.transcript.template = self.template
        self.images.append(image)
        note(f"[a picture of {image.width} x {image.height}; it goes with the next message]")

    def retry(self, options: dict[str, Any]) -> None:
        """Ask the last message again.

        Raises:
            ConfigError: there is none that can be taken back.
        """
        if self.last is None or self.last.text is None:
            raise ConfigError("there is no message to ask again; say it anew")
        text, self.images = self.last.text, self.last.images
        self.undo()
        self.turn(text, options)

    def undo(self) -> None:
        """Have the cache and the transcript as they were before the last message or file.

        Raises:
            ConfigError: it cannot be taken back.
        """
        if self.last is None:
            raise ConfigError(
                "there is nothing to take back: only the last message or file can be, and only once"
            )
        self.cache, self.transcript = self.last.cache, self.last.transcript
        self.last = self.spoken = None

    def go_on(self, options: dict[str, Any]) -> None:
        """Go on with an answer that was cut short.

        Raises:
            ConfigError: there is none here.
        """
        from ..api import backend_of

        last = self.last
        if last is None or last.ended or not last.said:
            raise ConfigError("there is no answer to go on with; say something")
        self._check()
        behind = len(last.turn.new) + len(last.said) - (self.cache.seen - last.cache.seen)
        if behind == 0 and backend_of(self.model).take_back(self.cache, 1):
            behind = 1
        if behind == 0:
            # the last token has been through a compaction: the whole turn is read once more
            self.cache, behind = copied(last.cache), len(last.turn.new) + len(last.said)
        self._speak([*last.turn.new, *last.said][-behind:], options)

    def _prompt(self, ids: list[int], last: Last) -> Any:
        """What is read: the ids alone, or with the pictures that are among them."""
        whole = last.images and len(ids) > len(last.said)
        return self.template.prompt(ids) if whole else ids

    def read(self, path: Path, step: int) -> None:
        """Read a text file, which the next message joins.

        Raises:
            ConfigError: it cannot be read; the conversation is as before.
        """
        text = self.company.told(lambda: read_text(str(path)))
        if not text.strip():
            raise ConfigError(f"{path} is empty; give a file with text")
        last = self._begin(None, lambda transcript, _: transcript.plan_text(text))
        with progress() as tell, self.company.stoppable() as stop:
            reading = Reading(self.model, self.tokenizer, self.cache, last.base.copy())

            def advance(done: int, total: int) -> None:
                tell(done, total)
                if done < total and stop():
                    raise Stopped

            self.last = last
            try:
                reading.read_turn(last.turn, step, advance)
            except Stopped:
                pass
            finally:
                assert reading.transcript is not None
                self.transcript = reading.transcript
        done, total = self.cache.seen - last.cache.seen, len(last.turn.new)
        cut = "" if done == total else f" of {total:,}; /read it again to go on, or ask"
        note(f"[read {done:,} tokens{cut}]" if cut else f"[read {done:,} tokens; ask about them]")

    def _begin(self, text: str | None, plan: Callable[[Transcript, Any], Turn]) -> Last:
        self._check()
        base = self.transcript.copy()
        turn = self.company.agree(lambda: plan(base, text))
        return Last(copied(self.cache), self.transcript.copy(), text, base, turn)

    def _speak(self, ids: list[int], options: dict[str, Any]) -> None:
        """Read tokens of the last turn and answer; however that ends, the transcript says what was read."""
        from ..api import stream_generate

        last = self.last
        assert last is not None
        words, text, response = speech(), Detokenizer(self.tokenizer.decode), None
        for token in last.said:
            text.add(token)
        text.end()
        read = self.cache.seen
        with progress() as tell, self.company.stoppable() as stop:

            def advance(done: int, total: int) -> None:
                tell(done, total)
                if done < total and stop():
                    raise Stopped

            stream: Any = stream_generate(
                self.model,
                self.tokenizer,
                self._prompt(ids, last),
                cache=self.cache,
                prompt_progress_callback=advance,
                **options,
            )
            try:
                for response in stream:
                    last.said.append(response.token)
                    ended = response.finish_reason == "stop"
                    piece = "" if ended else text.add(response.token)
                    last.answer, last.ended = last.answer + piece, ended
                    show(words.add(piece))
                    asking = response.finish_reason is None and len(last.said) % self.company.every == 0
                    if asking and stop():
                        break
            except Stopped:
                pass
            finally:
                if hasattr(stream, "close"):
                    stream.close()
                rest = text.end()
                last.answer += rest
                self.transcript = last.base.copy()
                grown = self.cache.seen - last.cache.seen
                self.transcript.account(last.turn, grown, last.said, last.answer, last.ended)
        if response is None and last.images:
            # a half that was read could not be told from the whole
            self.undo()
            self.images = last.images
            note("[stopped; the message is taken back, and its pictures go with the next one]")
            return
        if response is None:
            note(f"[stopped after {self.cache.seen - read} of {len(ids)} tokens were read]")
            return
        self.spoken = response
        stopped = " [stopped; /continue goes on]" if response.finish_reason is None else ""
        show(words.add(rest + stopped) + words.end())
        click.echo()
        if response.finish_reason == "length":
            note(f"[cut by --max-tokens {options['max_tokens']}; /continue goes on]", err=True)

    def _check(self) -> None:
        if self.cache.seen != len(self.transcript):
            raise CacheError(
                f"the cache has read {self.cache.seen} tokens, the conversation has {len(self.transcript)}; "
                "begin anew with /reset"
            )

    # ------------------------------------------------------------------ commands

    def run(self, name: str, argument: str, options: dict[str, Any]) -> bool:
        """One of our commands; False ends the conversation.

        Raises:
            ConfigError: it lacks its file, or has something behind it that it does not take.
        """
        if bool(argument) != _TAKES_FILE[name]:
            wrong = f"{name} takes nothing behind it" if argument else f"{name} needs a file behind it"
            raise ConfigError(f"{wrong}; to say this to the model, begin the line with a space")
        argument = unquoted(argument)
        path = Path(os.path.expanduser(argument))
        if name == "/reset":
            self.reset()
            note("[a new conversation; the cache is empty]")
        elif name == "/stats":
            note(self.stats())
        elif name == "/help":
            self.help()
        elif name == "/undo":
            self.undo()
            note(f"[taken back; {self.cache.seen:,} tokens are read]")
        elif name == "/retry":
            self.retry(options)
        elif name == "/continue":
            self.go_on(options)
        elif name == "/image":
            self.picture(argument)
        elif name == "/read":
            self.read(path, options.get("prefill_step_size", 2048))
        elif name == "/save":
            self.save(path)
        elif name == "/load":
            self.load(path)
        return name != "/quit"

    def help(self) -> None:
        """Our commands, and how to type."""
        note("\n".join(f"{name:<12}{what}" for name, what in COMMANDS.items()))
        note("Any other line is text for the model; so is one of these behind a space.")
        note(HELP)
        note("Ctrl-C stops an answer, and the cache stays whole.")

    def stats(self) -> str:
        """What is remembered, in plain words."""
        from ..api import backend_of

        if not self.cache.seen:
            return f"[nothing read yet; KV {size(self.cache.nbytes)}]"
        heads, full = backend_of(self.model).full_cache(self.model, self.cache)
        kept = f"remembers {self.cache.entries / heads:,.0f} of {self.cache.seen:,} tokens"
        said = f"[{kept}, {size(self.cache.nbytes)}; a full cache would take {size(full)}]"
        if (spoken := self.spoken) is not None:
            said += (
                f"\n[last answer: {spoken.prompt_tokens} prompt tokens at {spoken.prompt_tps:.0f}/s, "
                f"{spoken.generation_tokens} generated at {spoken.generation_tps:.1f}/s]"
            )
        return said

    def save(self, path: Path) -> None:
        """Write conversation and cache."""
        from ..api import save_cache

        save_cache(self.model, self.cache, path, self.transcript.notes())
        note(f"[saved {self.cache.seen} tokens of conversation to {path}]")

    def begin_with(self, path: Path) -> None:
        """Begin with a saved conversation or reading, whose options are this session's.

        Raises:
            CheckpointError, ModelMismatchError: it cannot go on here.
        """
        self._take(path)
        self.eviction, self.system = settings(self.cache), self.transcript.system

    def load(self, path: Path) -> None:
        """Go on with a saved conversation, its options and its system message.

        Raises:
            CheckpointError, ModelMismatchError: it cannot go on here; the conversation is as before.
        """
        before = settings(self.cache)
        self._take(path)
        found = settings(self.cache)
        if found != before:
            differs = {name: value for name, value in found.items() if value != before.get(name)}
            said = ", ".join(f"{name} {value}" for name, value in differs.items())
            note(f"[it goes on with {said}, as it was saved; /reset goes back to this session's options]")
        if (own := self.transcript.system) != self.system:
            said = "no system message" if own is None else f"system message {own!r}"
            note(f"[it goes on with {said}, as it was saved]")

    def _take(self, path: Path) -> None:
        from ..api import load_cache

        cache, notes = load_cache(self.model, path)
        transcript = Transcript.resumed(self.template, notes, cache.seen)
        self.transcript, self.cache, self.last, self.spoken = transcript, cache, None, None
        note(f"[loaded {cache.seen} tokens of conversation]")


def settings(cache: Any) -> dict[str, Any]:
    """The eviction options a cache was made with."""
    return {"policy": "full"} if cache.shared is None else dict(cache.shared.config.to_dict())
