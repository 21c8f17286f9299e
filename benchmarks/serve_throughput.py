"""Our server beside mlx-lm's own, with a full cache, in one run: tokens/s, time to first token, memory.

    python benchmarks/serve_throughput.py --model demo --budget 64

Both servers stand at once and take turns, so that a busy machine slows both: figures are medians over the
rounds, ratios medians of a round's ratios. Clients ask at the same time, each with a prompt of its own that
no server has read before, and stream the answer. Tokens/s are all answers' tokens in the time from the first
question to the last answer, reading included; memory is the process's peak in the cell (Linux: /proc),
weights included. CPU seconds are the process's, all threads, by request: busy machines change them least.
Cells of several models are gathered in one file: those that are there stay.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import random
import re
import statistics
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlx_kvret.core.files import whole_file
from mlx_kvret.demo import STORY
from mlx_kvret.zoo.names import model_folder

OURS = "from mlx_kvret.cli import main; main()"
HEAD = (
    "| model, budget | context | clients | tokens/s | mlx_lm.server | ratio "
    "| first token | mlx_lm.server | ratio | peak MB | mlx_lm.server | rounds "
    "| CPU s a request | mlx_lm.server |\n"
    "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|\n"
)


@dataclass
class Server:
    """A process that answers on a port."""

    process: subprocess.Popen[bytes]
    port: int
    model: str
    rates: list[float] = field(default_factory=list)
    firsts: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)

    def wait(self) -> None:
        for _ in range(600):
            try:
                connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=5)
                connection.request("GET", "/health")
                if connection.getresponse().status == 200:
                    return
            except OSError:
                time.sleep(0.2)
            if self.process.poll() is not None:
                break
        raise SystemExit(f"the server on port {self.port} did not start")

    def forget_peak(self) -> None:
        Path(f"/proc/{self.process.pid}/clear_refs").write_text("5")

    @property
    def peak(self) -> float:
        """MB."""
        text = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.findall(r"VmHWM:\s+(\d+)", text)[0]) / 1024

    @property
    def worked(self) -> float:
        """CPU seconds so far, those of threads that have ended too."""
        told = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(told[11]) + int(told[12])) / os.sysconf("SC_CLK_TCK")

    def ask(self, prompt: str, most: int) -> tuple[float, int]:
        """Seconds to the first token, and tokens of the answer."""
        begun, first = time.monotonic(), 0.0
        body = {"model": self.model, "prompt": prompt, "max_tokens": most, "stream": True, "temperature": 0}
        body |= {"stream_options": {"include_usage": True}}
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=1800)
        connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
        answer, tokens = connection.getresponse(), 0
        if answer.status != 200:
            raise SystemExit(f"{answer.status}: {answer.read()!r:.300}")
        for line in answer:
            if not line.startswith(b"data: {"):
                continue
            told = json.loads(line[6:])
            if not first and told["choices"] and told["choices"][0].get("text"):
                first = time.monotonic() - begun
            tokens = (told.get("usage") or {}).get("completion_tokens", tokens)
        return first, tokens

    def round(self, prompts: list[str], most: int) -> None:
        """All clients at once."""
        found: list[Any] = [None] * len(prompts)

        def run(at: int) -> None:
            found[at] = self.ask(prompts[at], most)

        threads = [threading.Thread(target=run, args=(at,)) for at in range(len(prompts))]
        begun, worked = time.monotonic(), self.worked
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if None in found:
            raise SystemExit(f"the server on port {self.port} did not answer")
        self.rates.append(sum(tokens for _, tokens in found) / (time.monotonic() - begun))
        self.firsts.append(statistics.median(first for first, _ in found))
        self.cpu.append((self.worked - worked) / len(prompts))


def servers(model: str, budget: str, memory: str) -> tuple[Server, Server]:
    folder = str(model_folder(model) or model)
    started = []
    base = random.randrange(20_000, 60_000)
    for at, line in enumerate(
        (
            [
                "-c",
                OURS,
                "serve",
                "--model",
                model,
                "--backend",
                "mlx",
                "--budget",
                budget,
                "--memory",
                memory,
            ],
            ["-m", "mlx_lm.server", "--model", folder, "--log-level", "ERROR"],
        )
    ):
        command = [sys.executable, *line, "--port", str(base + at)]
        started.append(Server(
            subprocess.Popen(command, stderr=subprocess.DEVNULL), base + at, folder if at else model
        ))  # fmt: skip
    for server in started:
        server.wait()
    return started[0], started[1]


def prompts(tokenizer: Any, tokens: int, count: int, drawn: random.Random) -> list[str]:
    """Texts of about so many tokens, whose beginnings differ."""
    words = STORY.read_text(encoding="utf-8").split()
    per_word = len(tokenizer.encode(" ".join(words[:500]))) / 500
    found = []
    for _ in range(count):
        start = drawn.randrange(len(words))
        turned = drawn.sample(words, 4) + words[start:] + words[:start]
        found.append(" ".join(turned[: int(tokens / per_word)]))
    return found


def cell(pair: tuple[Server, Server], tokenizer: Any, context: int, clients: int, options: Any) -> str:
    drawn = random.Random(context * 100 + clients)
    for server in pair:
        server.rates, server.firsts, server.cpu = [], [], []
        server.forget_peak()
    for at in range(options.rounds):
        for server in pair if at % 2 else pair[::-1]:
            server.round(prompts(tokenizer, context, clients, drawn), options.tokens)
    ours, stock = pair
    rate = statistics.median(a / b for a, b in zip(ours.rates, stock.rates, strict=True))
    first = statistics.median(b / a for a, b in zip(ours.firsts, stock.firsts, strict=True))
    middle = statistics.median
    return (
        f"| {options.model}, {options.budget} | {context:,} | {clients} | {middle(ours.rates):.1f} | "
        f"{middle(stock.rates):.1f} | {rate:.2f} × | {middle(ours.firsts):.2f} s | "
        f"{middle(stock.firsts):.2f} s | {first:.2f} × | {ours.peak:.0f} | {stock.peak:.0f} | "
        f"{options.rounds} | {statistics.mean(ours.cpu):.2f} | {statistics.mean(stock.cpu):.2f} |"
    )


def written(path: Path, rows: list[str], options: Any) -> None:
    """The file with these rows in place of those of the same cells."""
    old = path.read_text(encoding="utf-8").splitlines() if path.exists() else []

    def key(row: str) -> tuple[str, ...]:
        return tuple(part.strip() for part in row.split("|")[1:4])

    known = {key(row): row for row in old if row.startswith("| ") and "context" not in row}
    known |= {key(row): row for row in rows}
    text = (
        "# Our server and mlx_lm.server, side by side\n\n"
        f"By `python benchmarks/serve_throughput.py`, {time.strftime('%Y-%m-%d')}: mlx-lm's server keeps a "
        "full cache, ours (M + B) tokens per KV head. MLX's CPU device, one thread each, on 2 cores that "
        "others were using: read the ratios (of rounds in turn, above 1 is better than mlx_lm.server), not "
        "the times. "
        f"Answers of {options.tokens} tokens.\n\n{HEAD}" + "\n".join(known.values()) + "\n"
    )
    with whole_file(path) as scratch:
        scratch.write_text(text, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--budget", default="64")
    parser.add_argument("--memory", default="1GB")
    parser.add_argument("--contexts", type=int, nargs="+", default=[512, 4096])
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 8])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results/serve_throughput.md")
    options = parser.parse_args()
    import mlx_kvret

    _, tokenizer = mlx_kvret.load(options.model, None, backend="mlx")
    pair = servers(options.model, options.budget, options.memory)
    rows = []
    try:
        for server in pair:
            # what is made once
            server.round(prompts(tokenizer, 64, 2, random.Random(0)), 4)
        for context in options.contexts:
            for clients in options.clients:
                rows.append(cell(pair, tokenizer, context, clients, options))
                print(rows[-1], flush=True)
                written(options.out, rows, options)
    finally:
        for server in pair:
            server.process.terminate()
            server.process.wait(30)


if __name__ == "__main__":
    main()
