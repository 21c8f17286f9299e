"""The pictures of how-it-works.md, drawn from the policy itself.

python docs/make_pictures.py            writes pool.svg and dilution.svg
python docs/make_pictures.py --check    only says whether they are what would be written
"""

from __future__ import annotations

import math
import sys
from pathlib import Path

import numpy as np

from mlx_kvret.core.config import EvictionConfig
from mlx_kvret.core.eviction import select
from mlx_kvret.core.retention import retention_score

FOLDER = Path(__file__).parent
HEADS, BUDGET, BUFFER, SEEN = 4, 4, 2, 16
# colours of Okabe and Ito, which the colour-blind tell apart; letters say the same
STYLE = """\
<style>
  svg { font: 14px system-ui, sans-serif }
  .paper { fill: #fff } .ink { fill: #1f2328 } .line { stroke: #1f2328 } .pale { stroke: #8c959f }
  .a { fill: #56b4e9 } .b { fill: #e69f00 } .c { fill: #009e73 } .d { fill: #cc79a7 }
  .full { stroke: #d55e00 } .kept { stroke: #0072b2 } .on { fill: #000 }
  text.full { fill: #d55e00; stroke: none } text.kept { fill: #0072b2; stroke: none }
  .new { stroke: #1f2328; stroke-width: 3 } .gone { fill-opacity: .25; stroke-dasharray: 4 3 }
  @media (prefers-color-scheme: dark) {
    .paper { fill: #0d1117 } .ink { fill: #e6edf3 } .line, .new { stroke: #e6edf3 } .pale { stroke: #6e7681 }
    .gone + text { fill: #e6edf3 } .kept { stroke: #56b4e9 } text.kept { fill: #56b4e9 }
    .full { stroke: #e69f00 } text.full { fill: #e69f00 }
  }
</style>
"""
# head and position of an entry; None for a free slot
Slot = tuple[int, int] | None
Entries = set[tuple[int, int]]


class Pool:
    """A cache of four heads in slots, kept by the policy; every number is an entry's position."""

    def __init__(self) -> None:
        rng = np.random.default_rng(20)
        # heads differ in how long their tokens stay useful
        scale = np.array([0.03, 0.06, 0.12, 0.6])[:, None]
        self.log_beta = -(scale * rng.exponential(size=(HEADS, SEEN))).astype(np.float32)
        self.slots: list[Slot] = [None] * (HEADS * BUDGET)
        self.window: list[tuple[int, int]] = []
        self.config = EvictionConfig(budget=BUDGET, buffer=BUFFER)

    @property
    def entries(self) -> list[tuple[int, int]]:
        return [slot for slot in self.slots if slot] + self.window

    def keep(self, seen: int) -> Entries:
        head, position = (np.array(values) for values in zip(*self.entries, strict=True))
        score = retention_score(self.log_beta[head, position], position, seen)
        mask = select(score, position, head, seen, self.config, layers=2, kv_heads=2)
        return {entry for entry, stays in zip(self.entries, mask, strict=True) if stays}

    def move(self, kept: Entries) -> Entries:
        """Free the slots of what goes and fill them with what stays of the recent window; returns that."""
        self.slots = [slot if slot in kept else None for slot in self.slots]
        came = [entry for entry in self.window if entry in kept]
        for entry in came:
            self.slots[self.slots.index(None)] = entry
        self.window = []
        return set(came)


def pool_svg() -> str:
    """The cache before and after a compaction."""
    pool = Pool()
    for position in range(SEEN):
        pool.window += [(head, position) for head in range(HEADS)]
        if position + 1 == SEEN:
            break
        if (position + 1) % BUFFER == 0:
            pool.move(pool.keep(position + 1))
    kept = pool.keep(SEEN)
    title = f"Due: {len(pool.entries)} entries, (M + B)·L·H"
    parts = _panel(pool, 10, title, set(pool.entries) - kept, set())
    came = pool.move(kept)
    parts += _panel(pool, 205, f"After: the best {len(kept)} of all heads together, M·L·H", set(), came)
    for y, text in (
        (412, "A to D: KV heads; the number: a token's position; M = 4, B = 2"),
        (434, "dashed: evicted; thick: came from the recent window into a freed slot"),
    ):
        parts.append(f'<text class="ink" x="20" y="{y}">{text}</text>')
    return _svg(640, 450, parts, "The pool before and after a compaction")


def _panel(pool: Pool, top: int, title: str, gone: Entries, came: Entries) -> list[str]:
    """All entries of the pool and the recent window, those marked that go, and those that came."""
    parts = [f'<text class="ink" x="20" y="{top + 20}" font-weight="bold">{title}</text>']
    parts.append(f'<text class="ink" x="20" y="{top + 44}">pool: M·L·H slots</text>')
    parts.append(f'<text class="ink" x="420" y="{top + 44}">recent window: B per head</text>')
    for index, slot in enumerate(pool.slots):
        parts += _cell(20 + index % 8 * 46, top + 54 + index // 8 * 46, slot, gone, came)
    for head in range(HEADS):
        own: list[Slot] = [entry for entry in pool.window if entry[0] == head]
        for place, entry in enumerate(own or [None] * BUFFER):
            parts += _cell(420 + head * 46, top + 54 + place * 46, entry, gone, came)
    counts = [sum(entry[0] == head for entry in pool.entries) for head in range(HEADS)]
    told = ", ".join(f"{name} {count}" for name, count in zip("ABCD", counts, strict=True))
    parts.append(f'<text class="ink" x="20" y="{top + 168}">entries per head: {told}</text>')
    return parts


def _cell(x: int, y: int, entry: Slot, gone: Entries, came: Entries) -> list[str]:
    if entry is None:
        return [f'<rect class="paper pale" x="{x}" y="{y}" width="40" height="40" rx="4"/>']
    head, position = entry
    state = "gone line" if entry in gone else "new" if entry in came else "pale"
    box = f'<rect class="{"abcd"[head]} {state}" x="{x}" y="{y}" width="40" height="40" rx="4"/>'
    words = f'<text class="on" x="{x + 20}" y="{y + 25}" text-anchor="middle">{"ABCD"[head]}{position}</text>'
    return [box, words]


def share(useful: int, margin: float, entries: int) -> float:
    """Of a softmax, what ``useful`` entries get whose logits are ``margin`` above those of the others."""
    weight = useful * math.exp(margin)
    return weight / (weight + entries - useful)


def dilution_svg() -> str:
    """The share of attention that useful entries get, by the length of the text."""
    left, right, top, bottom, budget = 70, 560, 40, 300, 256
    lengths = [2**power for power in range(6, 18)]

    def place(length: int, value: float) -> tuple[float, float]:
        across = (math.log2(length) - 6) / 11
        return left + across * (right - left), bottom - value * (bottom - top)

    title = "Share of attention on 16 useful entries"
    parts = [f'<text class="ink" x="{left}" y="22" font-weight="bold">{title}</text>']
    for value in (0, 0.25, 0.5, 0.75, 1):
        y = place(64, value)[1]
        parts.append(
            f'<line class="pale" x1="{left}" y1="{y:.1f}" x2="{right}" y2="{y:.1f}" stroke-opacity=".4"/>'
        )
        parts.append(
            f'<text class="ink" x="{left - 10}" y="{y + 5:.1f}" text-anchor="end">{value:.0%}</text>'
        )
    for length in lengths[::2]:
        x = place(length, 0)[0]
        parts.append(
            f'<text class="ink" x="{x:.1f}" y="{bottom + 22}" text-anchor="middle">{length:,}</text>'
        )
    middle = (left + right) / 2
    parts.append(f'<text class="ink" x="{middle}" y="{bottom + 45}" text-anchor="middle">tokens seen</text>')
    for name, words, dash, most in (
        ("full", "full cache", "", max(lengths)),
        ("kept", f"{budget} entries kept", ' stroke-dasharray="9 4"', budget),
    ):
        values = [share(16, 4, min(length, most)) for length in lengths]
        points = " ".join(f"{x:.1f},{y:.1f}" for x, y in map(place, lengths, values))
        parts.append(f'<polyline class="{name}" points="{points}" fill="none" stroke-width="3"{dash}/>')
        x, y = place(lengths[-1], values[-1])
        parts.append(f'<text class="{name}" x="{x + 10:.1f}" y="{y + 5:.1f}">{words}</text>')
    return _svg(730, 360, parts, "Attention dilution")


def _svg(width: int, height: int, parts: list[str], title: str) -> str:
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img">\n'
    paper = f'<rect class="paper" width="{width}" height="{height}"/>\n'
    return head + f"<title>{title}</title>\n" + STYLE + paper + "\n".join(parts) + "\n</svg>\n"


def main() -> None:
    made = {"pool.svg": pool_svg(), "dilution.svg": dilution_svg()}
    for name, text in made.items():
        path = FOLDER / name
        if sys.argv[1:] != ["--check"]:
            path.write_text(text, encoding="utf-8")
        elif not path.exists() or path.read_text(encoding="utf-8") != text:
            sys.exit(f"{path} is stale; run `python docs/make_pictures.py`")


if __name__ == "__main__":
    main()
