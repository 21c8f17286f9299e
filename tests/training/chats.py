"""Chats in the language of the demo model."""

import json
from pathlib import Path

import numpy as np

from mlx_kvret.demo.language import decode, question, story


def write_chats(path: Path, count: int, tokens: int, seed: int = 0) -> Path:
    """Stories of the demo language, each with 4 questions and answers."""
    rng = np.random.default_rng(seed)
    with path.open("w") as file:
        for text in (story(tokens - 16, 4, 4, rng) for _ in range(count)):
            messages, said = [], text.text
            for name, value in text.facts.items():
                said = f"{said} {decode(question(name))}".strip()
                messages += [{"role": "user", "content": said}, {"role": "assistant", "content": value}]
                said = ""
            file.write(json.dumps({"messages": messages}) + "\n")
    return path
