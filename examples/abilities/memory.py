"""Chats of twenty turns in one cache: facts told in ten of them, all asked for in the end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from mlx_kvret.conversation import Transcript
from mlx_kvret.evaluation import Question, Sample, Turn
from mlx_kvret.evaluation.writer import Writer

from .chats import Answer, say, scripted
from .facts import ANSWER_TOKENS, IN_A_CHAT, ask, draw_facts
from .prose import Text
from .talks import TALKS

WORDS = "{} Please answer in one sentence."


def chat_with_facts(
    tokenizer: Any, talks: Sequence[int], answers: Sequence[Sequence[Answer]], seed: int
) -> Text:
    """Every other turn tells a fact; between them stand two talks with the full cache's answers."""
    rng, writer, transcript = np.random.default_rng(seed), Writer(tokenizer, chat=True), Transcript(tokenizer)
    facts = draw_facts(IN_A_CHAT, rng)
    talked = [pair for talk in talks for pair in zip(TALKS[talk], answers[talk], strict=True)]
    thanks = scripted(transcript, "Thank you for telling me.", tokenizer)
    ids: list[int] = []
    for fact, (text, answer) in zip(facts, talked, strict=True):
        for said, replied in ((f"By the way: {fact.told}", thanks), (text, answer)):
            read, answered = say(transcript, said, replied)
            ids += read + answered
    asked = tuple(
        ask(
            fact,
            Question(
                tuple(transcript.plan(WORDS.format(fact.asked)).new),
                (),
                (fact.value,),
                "any",
                max_tokens=ANSWER_TOKENS,
            ),
            writer,
        )
        for fact in facts
    )
    return Text(Sample((Turn(tuple(ids), tuple(one.question for one in asked)),)), asked)
