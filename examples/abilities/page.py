"""The page of what the real model can do within a budget."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mlx_kvret.core.files import whole_file
from mlx_kvret.evaluation import Cell, entries
from mlx_kvret.evaluation.report import Entry
from mlx_kvret.evaluation.runner import FULL

ENOUGH = 0.6
HEAD = (
    "By `python examples/real_abilities.py`, bfloat16 on a CPU unless said. Budgets are parts of the "
    "text, which is read in chunks of half a budget; the buffer is an eighth of it, and every policy "
    "protects four sinks. Behind a mean stands in brackets by how much it is above the full cache's: "
    "paired over texts, ± standard error (over sets of gates too). Of nats fewer are better, of "
    "everything else more."
)
# how the names of methods begin, and what they are called on the page
METHODS = {
    "full": "full cache",
    "learned-global": "**learned, global**",
    "h2o": "H2O (sees attention)",
    "recent": "sinks + window",
}
LEARNED = "learned-global"
# how much is kept is no ability: nothing is compared with the full cache, which keeps all
KEPT = "entries kept"


@dataclass(frozen=True)
class Section:
    """Tasks of one kind on the page. Of ``exact`` ones nothing is claimed where the full cache fails."""

    title: str
    tasks: str
    told: str


SECTIONS = (
    Section(
        "Facts in prose",
        "facts in prose",
        "Five facts among the sentences of text that no gates have seen (plays, Moby-Dick, Perl's "
        "manuals), asked for after it, when entries have gone, each on a copy of the cache. *answered*: "
        "in the model's own words, up to 24 tokens, which must name the value; *completed*: greedily, "
        "once the answer is begun; *chosen*: the value is the likeliest of seven; *nats*: per token of "
        "the value. A text's score is the mean over its five facts.",
    ),
    Section(
        "Twenty turns of a chat in one cache",
        "chat of twenty turns",
        "Ten turns tell a fact each, ten are talk with the full cache's answers; then all ten facts are "
        "asked for. Scored as above; budgets are parts of the whole chat.",
    ),
    Section(
        "Five-turn talks: does a bounded cache answer as the full one?",
        "talks",
        "Six talks of five turns; the full cache's greedy answers of up to 64 tokens are read by "
        "the other caches, and entries go at the same tokens as in decoding. *nats*: per token of the "
        "full cache's answer; *before the first difference*: the share of an answer until a greedy one "
        "would differ; *greedy tokens*: the share of its tokens that are still the likeliest. The full "
        "cache's own row is what rounding does: it reads in pieces what it had said token by token.",
    ),
    Section(
        "Attention on the words that hold the answer",
        "attention",
        "Paid by the last token of a question; five facts in each text. The ten heads are those of the "
        "full cache on the shortest texts, which flatters it there.",
    ),
    Section(
        "The same gates in fewer bits (MLX)",
        "gates",
        "Nats per token of three held-out texts (a play, a novel, a manual), and the share of entries "
        "kept as by the gates as they are on the model as it is, in one compaction. The model runs in "
        "float32; the copy in 4 bits (`mlx_lm.convert -q`, groups of 64) with its weights multiplied "
        "out.",
    ),
    Section(
        "Both backends",
        "both backends",
        "The public engine on MLX and on torch, float32, two facts of each text.",
    ),
)


def write_page(cells: Sequence[Cell], out: Path) -> None:
    """Where learned eviction loses, then a table for each thing that was measured."""
    found = entries(cells)
    lines = [
        "# What SmolLM2-135M-Instruct can do within a budget",
        "",
        *textwrap.wrap(HEAD, 110),
        "",
        "## Where learned eviction loses",
        "",
        "Against the full cache and every other policy, by more than two standard errors:",
        "",
        *_losses(found),
        "",
        "## What the full cache cannot do, so that nothing is claimed of it",
        "",
        *_cannot(found),
    ]
    for section in SECTIONS:
        own = [entry for entry in found if entry.task.startswith(section.tasks)]
        if own:
            lines += ["", f"## {section.title}", "", *textwrap.wrap(section.told, 110)]
            for task, length in dict.fromkeys((e.task, e.length) for e in own):
                lines += ["", *_table([e for e in own if (e.task, e.length) == (task, length)])]
    with whole_file(out, parents=True) as scratch:
        scratch.chmod(0o644)
        scratch.write_text("\n".join(lines) + "\n", encoding="utf-8")


def name_of(method: str) -> str:
    """A method's name on the page: without the options that all have, with the gates' family if it tells."""
    head, _, family = method.partition(" (")
    name = METHODS[head.partition(":")[0]]
    family = family.removesuffix(")")
    return name if family in ("", "smollm2") else f"{name}, {family}"


def _table(found: Sequence[Entry]) -> list[str]:
    """Methods down, budgets across."""
    budgets = sorted({e.budget for e in found} - {FULL}, key=lambda text: int(text.partition("/")[2]))
    full = next((e for e in found if e.budget == FULL and KEPT not in e.task), None)
    place = _place(found[0])
    count = found[0].scores.shape[1]
    rows = [f"{place}, n = {count}:", "", f"| | {' | '.join(budgets) or 'all entries'} |"]
    rows.append("|---" * (max(1, len(budgets)) + 1) + "|")
    if full is not None:
        shown = [_shown(full)] + [""] * (len(budgets) - 1)
        rows.append(f"| {METHODS['full']} | {' | '.join(shown)} |")
    shown_at = {(e.method, e.budget): _against(e, full) for e in found if e.budget != FULL}
    for method in dict.fromkeys(method for method, _ in shown_at):
        cells = [shown_at.get((method, budget), "–") for budget in budgets]
        rows.append(f"| {name_of(method)} | {' | '.join(cells)} |")
    return rows


def _place(entry: Entry) -> str:
    return f"{entry.task}, {entry.length:,} tokens" if entry.length else entry.task


def _digits(entry: Entry) -> int:
    # shares of attention are small
    return 4 if entry.task.startswith("attention: attention") else 3


def _shown(entry: Entry) -> str:
    digits = _digits(entry)
    error = "" if math.isnan(entry.error) else f" ± {entry.error:.{digits}f}"
    return f"{entry.mean:.{digits}f}{error}"


def _against(entry: Entry, full: Entry | None) -> str:
    if full is None:
        return _shown(entry)
    gain, error = _above(entry, full)
    digits = _digits(entry)
    told = "" if math.isnan(error) else f" ± {error:.{digits}f}"
    return f"{entry.mean:.{digits}f} ({gain:+.{digits}f}{told})"


def _above(entry: Entry, other: Entry) -> tuple[float, float]:
    """How much more an entry's figure is than another's, and its standard error."""
    gain, error = entry.ahead(other)
    return (-gain if entry.metric == "nll" else gain), error


def _losses(found: Sequence[Entry]) -> list[str]:
    """Each place where another policy is ahead, the worst first."""
    told = []
    for ours in found:
        if not ours.method.startswith(LEARNED) or KEPT in ours.task:
            continue
        for theirs in found:
            same = (theirs.task, theirs.length) == (ours.task, ours.length)
            if not same or theirs.budget not in (ours.budget, FULL) or theirs.method.startswith(LEARNED):
                continue
            gain, error = ours.ahead(theirs)
            if not math.isnan(error) and gain < -2 * error:
                digits = _digits(ours)
                names = (name_of(method).replace("*", "") for method in (ours.method, theirs.method))
                means = (f"{name} {e.mean:.{digits}f}" for name, e in zip(names, (ours, theirs), strict=True))
                behind = f"{-gain:.{digits}f} ± {error:.{digits}f} behind"
                line = f"- {_place(ours)}, {ours.budget}: {', '.join(means)} ({behind})"
                told.append((gain / max(error, 1e-9), line))
    return [line for _, line in sorted(told)] or ["Nowhere."]


def _cannot(found: Sequence[Entry]) -> list[str]:
    weak = [
        f"- {_place(e)}: right in {e.mean:.2f} ± {e.error:.2f}"
        for e in found
        if e.budget == FULL and e.task.endswith((": answered", ": completed", ": chosen")) and e.mean < ENOUGH
    ]
    return weak or ["Nothing of what is asked here: it is right in 60 % or more everywhere."]
