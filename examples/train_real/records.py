"""Training records for the real model: half plain text, half chats about it in the model's own template.

A chat asks for what was said long ago: a sentence by its beginning, what follows a sentence, the text word
for word, or facts that stood between passages. So the gates learn what is asked for later.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mlx_kvret.core.files import whole_file

# tokens of a plain record and of a chat: one to a row of 1,024
PLAIN, CHAT = 1000, 1024
# what a chat's text may take; the first that leaves room for the questions
CHAT_TEXTS = (820, 700, 440)
# records of a source: all have about the same weight, Python's manuals the most
MOST = {"python": 500, "jargon": 150}
NAMES = [
    "Ann", "Ben", "Clara", "David", "Eva", "Frank", "Grace", "Henry", "Ida", "Jack", "Kate", "Leo", "Mary",
    "Nick", "Olga", "Paul", "Rosa", "Sam", "Tina", "Victor",
]  # fmt: skip
THINGS = [
    "code", "phone number", "locker", "birthday year", "room", "flight", "favourite colour", "home town"
]  # fmt: skip
COLOURS = ["red", "blue", "green", "amber", "violet", "silver", "black", "white", "orange", "teal"]
TOWNS = ["Oslo", "Lima", "Quito", "Delhi", "Turin", "Leeds", "Basel", "Osaka", "Cairo", "Porto"]
VALIDATION = 24


def write_records(texts: dict[str, list[str]], tokenizer: Any, path: Path, seed: int = 0) -> int:
    """Write the records as JSON lines, always the same for the same texts; returns how many."""
    maker = _Maker(tokenizer, random.Random(seed))
    records = list(maker.records(texts))
    maker.rng.shuffle(records)
    with whole_file(path) as scratch, scratch.open("w", encoding="utf-8") as file:
        for record in records[VALIDATION:]:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
    return len(records) - VALIDATION


class _Maker:
    def __init__(self, tokenizer: Any, rng: random.Random):
        self.tokenizer, self.rng = tokenizer, rng

    def records(self, texts: dict[str, list[str]]) -> Iterator[dict[str, Any]]:
        chosen: list[str] = []
        for name, documents in texts.items():
            found = [piece for text in documents for piece in self.pieces(text, PLAIN)]
            self.rng.shuffle(found)
            chosen += found[: MOST.get(name, 170)]
        for piece in chosen:
            if self.rng.random() < 0.5:
                yield {"text": piece}
                continue
            for most in CHAT_TEXTS:
                short = next(self.pieces(piece, most), None)
                if short is None:
                    continue
                messages = self.chat(short)
                rendered = self.tokenizer.apply_chat_template(messages, tokenize=False)
                if self.count(rendered) <= CHAT:
                    yield {"messages": messages}
                    break

    def count(self, text: str) -> int:
        return len(self.tokenizer(text, verbose=False)["input_ids"])

    def pieces(self, text: str, most: int) -> Iterator[str]:
        """Paragraphs together, as many as fit into so many tokens; short remainders are left out."""
        found: list[str] = []
        size = 0
        for paragraph in _paragraphs(text):
            tokens = self.count(paragraph) + 2
            if tokens > most:
                continue
            if size + tokens > most:
                if size > most // 2:
                    yield "\n\n".join(found)
                found, size = [], 0
            found.append(paragraph)
            size += tokens

    def chat(self, text: str) -> list[dict[str, str]]:
        rng, kind, sentences = self.rng, self.rng.randrange(4), _sentences(text)
        if kind == 0 and len(sentences) > 5:
            said = [
                (
                    f"Here is a text.\n\n{text}\n\nRead it carefully.",
                    "I have read it. What would you like to know?",
                )
            ]
            for sentence in rng.sample(sentences, 2):
                begin = " ".join(sentence.split()[:5])
                said.append((f'Which sentence begins with "{begin}"?', sentence))
        elif kind == 1 and len(sentences) > 5:
            said = [(text, "Thank you, I read it.")]
            for i in rng.sample(range(len(sentences) - 1), 2):
                said.append((f'What does the text say after this: "{sentences[i]}"', sentences[i + 1]))
        elif kind == 2:
            said = [(f"{text}\n\nRepeat the text, word for word.", text)]
        else:
            said = list(self.facts(text))
        turns = [(("user", asked), ("assistant", answer)) for asked, answer in said]
        return [{"role": role, "content": content} for turn in turns for role, content in turn]

    def facts(self, text: str) -> Iterator[tuple[str, str]]:
        """Facts told between passages, then asked for."""
        facts = [
            (name, thing := self.rng.choice(THINGS), self.value(thing)) for name in self.rng.sample(NAMES, 5)
        ]
        passages = _paragraphs(text)
        step = max(1, len(passages) // 4)
        for i, (name, thing, value) in enumerate(facts[:4]):
            passage = "\n\n".join(passages[i * step : (i + 1) * step])
            yield f"{passage}\n\nPlease remember: the {thing} of {name} is {value}.", "Noted."
        for name, thing, value in self.rng.sample(facts[:4], 4):
            yield f"What is the {thing} of {name}?", f"The {thing} of {name} is {value}."

    def value(self, thing: str) -> str:
        if thing == "favourite colour":
            return self.rng.choice(COLOURS)
        return self.rng.choice(TOWNS) if thing == "home town" else str(self.rng.randrange(10**3, 10**6))


def _paragraphs(text: str) -> list[str]:
    return [part.strip() for part in re.split(r"\n\s*\n", text) if part.strip()]


def _sentences(text: str) -> list[str]:
    found = (part.strip() for part in re.split(r"(?<=[.!?])\s+", text.replace("\n", " ")))
    return [sentence for sentence in found if 40 < len(sentence) < 240]
