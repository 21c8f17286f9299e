"""Talks through the chat template: token ids turn by turn, and what the full cache answers in them."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import mlx_kvret
from mlx_kvret.conversation import Transcript
from mlx_kvret.core.files import whole_file
from mlx_kvret.evaluation.engine import end_tokens

from .talks import TALKS


@dataclass(frozen=True)
class Answer:
    """Tokens of an answer, its end token among them if it ended by itself (``stopped``)."""

    ids: tuple[int, ...]
    text: str
    stopped: bool


def say(transcript: Transcript, text: str, answer: Answer) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """A turn with its answer enters a transcript; the tokens read before the answer, and the answer's."""
    turn = transcript.plan(text)
    transcript.account(turn, len(turn.new) + len(answer.ids), answer.ids, answer.text, answer.stopped)
    return tuple(turn.new), answer.ids


def scripted(transcript: Transcript, text: str, tokenizer: Any) -> Answer:
    """An answer in given words."""
    end = min(end_tokens(tokenizer))
    return Answer((*transcript.template.encode(text), end), text, True)


def full_answers(path: Path, model: Any, tokenizer: Any, talks: int, most: int) -> list[list[Answer]]:
    """Greedy answers of the full cache through the public API; those in the file are not made again."""
    found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    for number, said in enumerate(TALKS[:talks]):
        key = f"{number}, {most} tokens"
        if key in found:
            continue
        transcript, cache = Transcript(tokenizer), mlx_kvret.make_cache(model, policy="full")
        answers = []
        for text in said:
            turn = transcript.plan(text)
            stream = mlx_kvret.stream_generate(model, tokenizer, turn.new, cache=cache, max_tokens=most)
            parts = list(stream)
            ids, words = tuple(int(part.token) for part in parts), "".join(part.text for part in parts)
            answers.append(Answer(ids, words, parts[-1].finish_reason == "stop"))
            transcript.account(turn, len(turn.new) + len(ids), ids, words, answers[-1].stopped)
        found[key] = [asdict(answer) for answer in answers]
        with whole_file(path, parents=True) as scratch:
            scratch.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        print(f"the full cache has answered talk {number + 1} of {talks}", flush=True)
    return [
        [Answer(**answer | {"ids": tuple(answer["ids"])}) for answer in found[f"{number}, {most} tokens"]]
        for number in range(talks)
    ]
