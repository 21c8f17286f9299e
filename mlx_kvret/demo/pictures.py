"""What the demo model with eyes sees: pictures of cells, one token each, that state facts and decoys.

A picture is a grid of cells of 16 × 16 pixels. A cell is plain paper, a *fact* (the initial of a name in
the colour that is its value, in a dark frame) or a *decoy* (the same without a frame). Whatever a cell
states can be said in words too: a fact is ``remember NAME VALUE``, a decoy ``rumour NAME VALUE``, and
questions are always in words.
"""

from __future__ import annotations

import numpy as np

from ..bitmap import Bitmap
from . import language as words
from .language import ID

Rng = np.random.Generator
PATCH, MERGE = 8, 2
CELL = PATCH * MERGE
PAPER, FACT, DECOY = range(3)

VISION = ("<|vision_start|>", "<|image_pad|>", "<|vision_end|>", "<|video_pad|>")
WORDS = words.WORDS + VISION
START, IMAGE, STOP, VIDEO = range(len(words.WORDS), len(WORDS))

# one name for each initial
NAMES = tuple(next(n for n in words.NAMES if n[0] == i) for i in sorted({n[0] for n in words.NAMES}))
PALETTE = {
    "red": (220, 20, 30),
    "orange": (250, 140, 0),
    "yellow": (235, 220, 0),
    "lime": (130, 230, 30),
    "green": (0, 120, 40),
    "cyan": (0, 200, 220),
    "blue": (20, 60, 230),
    "purple": (120, 20, 160),
    "pink": (250, 120, 190),
    "brown": (120, 70, 20),
    "black": (10, 10, 10),
    "silver": (140, 140, 150),
}
NAME_IDS = np.array([ID[name] for name in NAMES])
VALUE_IDS = np.array([ID[value] for value in PALETTE])

# rows of five pixels, top to bottom
_FONT = {
    "A": "01110 10001 10001 11111 10001 10001 10001",
    "B": "11110 10001 10001 11110 10001 10001 11110",
    "C": "01111 10000 10000 10000 10000 10000 01111",
    "D": "11110 10001 10001 10001 10001 10001 11110",
    "E": "11111 10000 10000 11110 10000 10000 11111",
    "F": "11111 10000 10000 11110 10000 10000 10000",
    "G": "01111 10000 10000 10011 10001 10001 01111",
    "H": "10001 10001 10001 11111 10001 10001 10001",
    "I": "01110 00100 00100 00100 00100 00100 01110",
    "J": "00111 00010 00010 00010 00010 10010 01100",
    "K": "10001 10010 10100 11000 10100 10010 10001",
    "L": "10000 10000 10000 10000 10000 10000 11111",
    "M": "10001 11011 10101 10101 10001 10001 10001",
    "N": "10001 11001 10101 10101 10011 10001 10001",
    "O": "01110 10001 10001 10001 10001 10001 01110",
    "P": "11110 10001 10001 11110 10000 10000 10000",
    "R": "11110 10001 10001 11110 10100 10010 10001",
    "S": "01111 10000 10000 01110 00001 00001 11110",
    "T": "11111 00100 00100 00100 00100 00100 00100",
    "V": "10001 10001 10001 10001 10001 01010 00100",
}
_SHIFTS = ((0, 0), (1, 0), (-1, 0), (0, 1), (0, -1))
_FRAME_SHADE, _PAPER_NOISE, _INK_NOISE = 40, 14, 10


def _glyphs() -> np.ndarray:
    """Masks of the initials, moved by a pixel or not, (names, shifts, CELL, CELL) bool."""
    found = np.zeros((len(NAMES), len(_SHIFTS), CELL, CELL), bool)
    for index, name in enumerate(NAMES):
        rows = np.array([[int(bit) for bit in row] for row in _FONT[name[0]].split()], bool)
        large = rows.repeat(2, 0).repeat(2, 1)
        for shift, (right, down) in enumerate(_SHIFTS):
            found[index, shift, 1 + down : 15 + down, 3 + right : 13 + right] = large
    return found


_GLYPHS = _glyphs()
_RGB = np.array(list(PALETTE.values()), np.float32)
_FRAME = np.zeros((CELL, CELL, 1), bool)
_FRAME[[0, -1]] = _FRAME[:, [0, -1]] = True


def cells(rng: Rng, kinds: np.ndarray, names: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Pixels of cells, (n, CELL, CELL, 3) uint8.

    Args:
        kinds: (n,) of ``PAPER``, ``FACT`` and ``DECOY``.
        names, values: (n,) places in ``NAMES`` and ``PALETTE``; of no meaning for paper.
    """
    count = len(kinds)
    shade = rng.uniform(170, 250, (count, 1, 1, 3))
    out = shade + _PAPER_NOISE * rng.standard_normal((count, CELL, CELL, 3), np.float32)
    drawn = np.flatnonzero(kinds != PAPER)
    if len(drawn):
        ink = _GLYPHS[names[drawn], rng.integers(len(_SHIFTS), size=len(drawn))][..., None]
        colour = _RGB[values[drawn]][:, None, None] + rng.normal(0, _INK_NOISE, (len(drawn), 1, 1, 3))
        out[drawn] = np.where(ink, colour, out[drawn])
    framed = np.flatnonzero(kinds == FACT)
    out[framed] = np.where(_FRAME, _FRAME_SHADE, out[framed])
    return np.clip(out, 0, 255).astype(np.uint8)


def picture(drawn: np.ndarray, rows: int, columns: int) -> Bitmap:
    """Cells (rows · columns, CELL, CELL, 3), row by row, as one picture."""
    joined = drawn.reshape(rows, columns, CELL, CELL, 3).swapaxes(1, 2)
    return Bitmap.of(joined.reshape(rows * CELL, columns * CELL, 3))
