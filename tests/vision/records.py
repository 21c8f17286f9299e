"""Photographs of noise, and training records that show them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image

from mlx_kvret.training.documents import Document
from mlx_kvret.training.packing import Batch


def photo(seed: int, high: int = 84, wide: int = 84) -> PIL.Image.Image:
    return PIL.Image.fromarray(np.random.default_rng(seed).integers(0, 255, (high, wide, 3), np.uint8))


def said(*content: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": content[0]}, {"role": "assistant", "content": content[1]}]


def album(folder: Path) -> Path:
    """Records of both forms, one of text, and one of two pictures."""
    (folder / "pictures").mkdir()
    for number in range(3):
        photo(number, 84, 56 + 28 * (number % 2)).save(folder / "pictures" / f"{number}.png")
    part = [{"type": "image"}, {"type": "text", "text": "w20 w21"}]
    rows = [
        {"messages": said(part, "w30 w31"), "images": ["pictures/0.png"]},
        {"messages": said("w22 <image> w23", "w32 w33 w34"), "images": ["pictures/1.png"]},
        {"messages": said("w24 w25 w26", "w35")},
        {"messages": said("<image> w27 <image>", "w36 w37"), "images": ["pictures/2.png", "pictures/0.png"]},
    ]
    path = folder / "albums.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def standing(batch: Batch, documents: Sequence[Document]) -> Iterator[tuple[int, int, slice]]:
    """The number of each document in a batch, and its row and columns there."""
    for row, begin in np.argwhere(batch.position == 0).tolist():
        for number, one in enumerate(documents):
            own = slice(begin, begin + len(one.ids))
            if one.ids.tolist() == batch.ids[row, own].tolist():
                yield number, row, own
