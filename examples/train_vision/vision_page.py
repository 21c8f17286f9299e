"""The page of what was measured on the demo with eyes."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

from mlx_kvret.core.files import whole_file
from mlx_kvret.evaluation import Results, entries
from mlx_kvret.evaluation.report import Entry

FULL = "all"
NAMES = {
    "learned-global:min_per_head=1 (pictures)": "**one budget for all, an entry a head at least**",
    "learned-global (pictures)": "one budget for all",
    "learned-global:threshold=0.2 (pictures)": "one budget for all, `threshold=0.2`",
    "learned-global:min_per_head=1,threshold=0.2 (pictures)": "one budget for all, both",
    "learned:scope=modality,picture_share=0.25 (pictures)": "pictures : text = 1 : 3",
    "learned:scope=modality,picture_share=0.5 (pictures)": "pictures : text = 1 : 1",
    "learned:scope=modality,picture_share=0.75 (pictures)": "pictures : text = 3 : 1",
    "learned-global:sinks=1 (pictures)": "one budget for all, `<s>` kept",
    "learned:scope=modality,picture_share=0.25,sinks=1 (pictures)": "pictures : text = 1 : 3, `<s>` kept",
    "learned:scope=modality,picture_share=0.5,sinks=1 (pictures)": "pictures : text = 1 : 1, `<s>` kept",
    "learned:scope=modality,picture_share=0.75,sinks=1 (pictures)": "pictures : text = 3 : 1, `<s>` kept",
    "learned-layer (pictures)": "per layer",
    "learned-head (pictures)": "per head",
    "learned-global (text)": "gates of the text demo, global",
    "learned-head (text)": "gates of the text demo, per head",
    "full": "full cache",
    "keydiff": "KeyDiff",
    "snapkv": "SnapKV (sees attention)",
    "recent": "sinks + window",
    "random": "random",
}
OURS = "learned-global:min_per_head=1 (pictures)"
NOTES = (
    "Why gates of text alone fail: the first layer reads a patch as the tower gives it, which no gate of text"
    " has seen, and those of the demo take every patch for everlasting. So patches fill layer 0,"
    " and what is needed in layer 1 goes. There the sigmoid is flat: training on from those gates does not "
    "mend it in 300 steps (`train(..., fresh=False)`), a fresh gate for the first layer does. Deeper layers "
    "read of a patch what they would read of words, and their gates are good from the start.",
    "",
    "Why an entry a head: at the smallest budget one competition leaves some heads without any. The model "
    "then still finds the value, and fails to end its answer. `min_per_head=1` keeps one each; the gates that"
    " are shipped ask for it. A fixed split cannot have a minimum per head, so both are compared with `<s>` "
    "kept in all heads as well.",
)
PLAIN = "learned-global (pictures)"
GLOBAL = tuple(name for name in NAMES if name.startswith("learned-global") and "pictures" in name)
SPLITS = tuple(name for name in NAMES if "modality" in name and "sinks" not in name)
BEGUN = tuple(name for name in NAMES if "sinks=1" in name)


def write_page(found: dict[str, Results], valid: dict[str, float], out: Path) -> None:
    """Tables of all results files, and what they say of the claim."""
    main, long = entries(found["main"]), entries(found["long"])
    minutes = sum(cell.seconds for results in found.values() for cell in results) / 60
    lines = [
        "# One budget for pictures and text",
        "",
        "The demo with eyes (`mlx-kvret generate --model demo-vision`): a stock Qwen3-VL of 0.3M parameters "
        "whose language model is the text demo's, unchanged, trained on at most 256 tokens. An album is four "
        "fifths pictures, one token to a cell; 16 facts, half of them *seen* in pictures and half *told* in "
        "words unless said otherwise, stand among decoys of both kinds; all are asked for in words, after "
        "the album was read and evicted from. Share of facts answered ± standard error over samples and over "
        "sets of gates. Gates started from those of the text demo, but for the first layer's.",
        "",
        f"`python examples/vision.py` writes this page; its cells took {minutes:.0f} minutes of one busy "
        f"thread. Gates by validation, global, mean over budgets: "
        + ", ".join(f"{label} {mean:.3f}" for label, mean in valid.items())
        + ".",
    ]
    lines += ["", *NOTES]
    for title, own in (("The length of training", main), ("Four times as long", long)):
        lines += ["", *_section(title, own)]
    lines += ["", *_ratios(entries(found["ratios"]))]
    lines += ["", *_chunks([e for name in found if name.startswith("chunk-") for e in entries(found[name])])]
    with whole_file(out) as scratch:
        scratch.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _section(title: str, found: Sequence[Entry]) -> list[str]:
    length, budgets = found[0].length, _budgets(found)
    by_place = {(e.method, e.budget): e for e in found}
    full = by_place["full", FULL]
    lines = [
        f"## {title}: {length:,} tokens, {_scale(found)}",
        "",
        "| | " + " | ".join(budgets) + " |",
        "|---" * (len(budgets) + 1) + "|",
        f"| full cache: {full.text}" + " |" * (len(budgets) + 1),
    ]
    for method, name in NAMES.items():
        if any((method, budget) in by_place for budget in budgets):
            cells = [by_place[method, budget].text for budget in budgets]
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
    lines += [
        "",
        f"One budget for all, against the best other policy at {length:,} tokens, paired by sample:",
        "",
    ]
    for budget in budgets:
        others = [e for e in found if e.budget == budget and e.method not in GLOBAL]
        lines.append(f"- {budget}: {_against(by_place[OURS, budget], others)}")
    return lines


def _against(ours: Entry, others: Sequence[Entry]) -> str:
    best = max(others, key=lambda e: e.mean)
    gain, error = ours.ahead(best)
    name = NAMES[best.method].replace("**", "")
    told = f"{gain:+.3f} ± {error:.3f} against {name}"
    if gain > 2 * error:
        return f"above every other, {told}"
    if gain >= -2 * error:
        return f"level with the best, {told}"
    worse = [e for e in others if ours.ahead(e)[0] < -2 * ours.ahead(e)[1]]
    return f"**below** {len(worse)} of {len(others)}, {told}"


def _ratios(found: Sequence[Entry]) -> list[str]:
    tasks = list(dict.fromkeys(e.task for e in found))
    names = [t.removeprefix("albums-").replace("-", " : ") for t in tasks]
    lines = [
        f"## Facts seen : told, {found[0].length:,} tokens, {_scale(found)}",
        "",
        "If pictures and text compete, no fixed split of the budget between them can be right for all "
        "proportions.",
    ]
    for budget in _budgets(found):
        here = {(e.method, e.task): e for e in found if e.budget in (budget, FULL)}
        lines += ["", f"A budget of {budget}:", "", "| | " + " | ".join(names) + " | mean |"]
        lines.append("|---" * (len(names) + 2) + "|")
        for method in ("full", OURS, PLAIN, *SPLITS, *BEGUN):
            own = [here[method, task] for task in tasks]
            mean = sum(e.mean for e in own) / len(own)
            lines.append(f"| {NAMES[method]} | " + " | ".join(e.text for e in own) + f" | {mean:.3f} |")
        lines.append("")
        for ours, splits in ((PLAIN, SPLITS), (BEGUN[0], BEGUN[1:])):
            for split in splits:
                gains = [here[ours, task].ahead(here[split, task]) for task in tasks]
                told = ", ".join(f"{gain:+.3f} ± {error:.3f}" for gain, error in gains)
                lines.append(f"- {NAMES[ours]} above {NAMES[split]}: {told}")
    return lines


def _chunks(found: Sequence[Entry]) -> list[str]:
    found = sorted(found, key=lambda e: e.chunk)
    lines = [
        f"## Tokens read at a time, {found[0].length:,} tokens, budget {found[0].budget}",
        "",
        "A picture is 38 tokens with its borders; smaller chunks cut it in parts, between which there are "
        "evictions.",
        "",
        "| | " + " | ".join(str(e.chunk) for e in found if e.method == PLAIN) + " |",
    ]
    lines.append("|---" * (lines[-1].count("|") - 1) + "|")
    for method in (PLAIN, "learned-head (pictures)"):
        lines.append(f"| {NAMES[method]} | " + " | ".join(e.text for e in found if e.method == method) + " |")
    return lines


def _budgets(found: Sequence[Entry]) -> list[str]:
    return sorted({e.budget for e in found if e.budget != FULL}, key=Fraction, reverse=True)


def _scale(found: Sequence[Entry]) -> str:
    seeds = max(len(e.scores) for e in found)
    return f"{found[0].scores.shape[1]} albums, {seeds} sets of gates"
