"""Gates that are known, and what their base models look like: those shipped here, and the papers' ten.

Where a base has several, the first is the default: the shipped one, then the global one, the general one
before the mathematical one. What was trained on is said when gates are taken.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from .. import demo
from ..core.fingerprint import FIELDS
from .names import BASES, DEMO, DEMO_VISION, SMOLLM2

SHIPPED_FOLDER = Path(__file__).parent.parent / "gates_shipped"
_MATHS = "reasoning traces in mathematics only; other texts may lose more"
_LONG = "long texts and questions on them"
_IMAGES = "images, videos and conversations about them"


@dataclass(frozen=True)
class Base:
    """A base model.

    ``shape`` is its :func:`~mlx_kvret.core.fingerprint.fingerprint`, which fine-tunes share; ``norms``, where
    it is known, the :func:`~.identity.norms_digest` of its weights, which they do not.
    """

    name: str
    shape: str
    norms: str | None = None


@dataclass(frozen=True)
class Entry:
    """Gates for a base: ``gates`` is a hub id, or, where there is a ``folder``, the name of shipped ones."""

    base: Base
    gates: str
    trained_on: str
    folder: Path | None = None

    @property
    def label(self) -> str:
        return self.gates.rpartition("/")[2]

    def __str__(self) -> str:
        where = "shipped as" if self.folder else "from"
        return f"{where} {self.gates}, made for {self.base.name} on {self.trained_on}"


def _shape(*numbers: object) -> str:
    names = (*FIELDS, "rope_theta")
    return " ".join(f"{name}={number}" for name, number in zip(names, numbers, strict=True))


_QWEN3_1_7B = Base("Qwen/Qwen3-1.7B", _shape(2048, 28, 16, 8, 128, 6144, "1e+06"))
_QWEN3_4B = Base("Qwen/Qwen3-4B", _shape(2560, 36, 32, 8, 128, 9728, "1e+06"))
_QWEN3_8B = Base("Qwen/Qwen3-8B", _shape(4096, 36, 32, 8, 128, 12288, "1e+06"))
_QWEN3_14B = Base("Qwen/Qwen3-14B", _shape(5120, 40, 40, 8, 128, 17408, "1e+06"))
_QWEN3_2507 = Base("Qwen/Qwen3-4B-Instruct-2507", _shape(2560, 36, 32, 8, 128, 9728, "5e+06"))
_PHI3 = Base("microsoft/Phi-3-mini-128k-instruct", _shape(3072, 32, 32, 32, 96, 8192, "10000"))
_VL_8B = Base("Qwen/Qwen3-VL-8B-Thinking", _shape(4096, 36, 32, 8, 128, 12288, "5e+06"))
_VL_4B = Base("Qwen/Qwen3-VL-4B-Instruct", _shape(2560, 36, 32, 8, 128, 9728, "5e+06"))
_SMOLLM2 = Base(BASES[SMOLLM2], _shape(576, 30, 9, 3, 64, 1536, "100000"), "a696f22fc49a86b5")
_DEMO_SHAPE = _shape(64, 3, 4, 2, 32, 128, "1e+06")
_DEMO, _DEMO_VISION = Base(DEMO, _DEMO_SHAPE), Base(DEMO_VISION, _DEMO_SHAPE)

RELEASED = (
    Entry(_QWEN3_1_7B, "ngocbh/TrimKV-Qwen3-1.7B-Math", _MATHS),
    Entry(_QWEN3_4B, "ngocbh/DBTrimKV-Qwen3-4B-Math", _MATHS),
    Entry(_QWEN3_4B, "ngocbh/TrimKV-Qwen3-4B-Math", _MATHS),
    Entry(_QWEN3_8B, "ngocbh/TrimKV-Qwen3-8B-Math", _MATHS),
    Entry(_QWEN3_14B, "ngocbh/TrimKV-Qwen3-14B-Math", _MATHS),
    Entry(_QWEN3_2507, "ngocbh/DBTrimKV-Qwen3-4B-Instruct-2507", _LONG),
    Entry(_QWEN3_2507, "ngocbh/TrimKV-Qwen3-4B-Instruct-2507", _LONG),
    Entry(_PHI3, "ngocbh/TrimKV-Phi-3-mini-128k-instruct", _LONG),
    Entry(_VL_8B, "ngocbh/DBTrimKV-Qwen3-VL-8B-Thinking", _IMAGES),
    Entry(_VL_4B, "ngocbh/DBTrimKV-Qwen3-VL-4B-Instruct", _IMAGES),
)
_SHIPPED = (
    Entry(_DEMO, DEMO, "stories in its own 198 words", demo.GATES),
    Entry(_DEMO_VISION, DEMO_VISION, "albums of pictures and its own words", demo.VISION_GATES),
    Entry(_SMOLLM2, SMOLLM2, "English novels, manuals, and chats about them", SHIPPED_FOLDER / SMOLLM2),
)


def entries() -> list[Entry]:
    """All known gates, the preferred ones of a base first."""
    return [entry for entry in _SHIPPED if entry.folder and entry.folder.is_dir()] + list(RELEASED)


def shipped(name: str) -> Path | None:
    """The folder of gates shipped under a name, or None."""
    return next((entry.folder for entry in entries() if entry.folder and entry.gates == name), None)
