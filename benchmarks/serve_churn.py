"""Clients that come, stream, drop and return to a server: no 5xx, memory flat, nothing left over.

    python benchmarks/serve_churn.py --clients 100 --seconds 600

Starts ``mlx-kvret serve`` on the demo model, has clients ask for answers of random length, four of ten of
whom leave at a random moment, and looks at the process every few seconds (Linux: /proc). Ends with status 1
if anything was answered with 5xx, if a request or a thread is left over, or if memory grew by more than 2 %
once a tenth of the time was over.
"""

from __future__ import annotations

import argparse
import http.client
import json
import random
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

from mlx_kvret.demo import STORY

WORDS = STORY.read_text(encoding="utf-8").split()


def start(options: list[str]) -> tuple[subprocess.Popen[str], int]:
    """A server, and the port it listens on."""
    code = "from mlx_kvret.cli import main; main()"
    line = [sys.executable, "-c", code, "serve", "--model", "demo", "--port", "0", *options]
    process = subprocess.Popen(line, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    for said in process.stderr:
        print(said.rstrip())
        if " at http://" in said:
            # what it says from now on is wanted too
            threading.Thread(target=sys.stderr.writelines, args=(process.stderr,), daemon=True).start()
            return process, int(said.split("/v1")[0].rpartition(":")[2])
    raise SystemExit("the server did not start")


def state(process: subprocess.Popen[str]) -> tuple[float, int]:
    """Resident memory in MB, and threads."""
    found = dict(line.split(":", 1) for line in Path(f"/proc/{process.pid}/status").read_text().splitlines())
    return int(found["VmRSS"].split()[0]) / 1024, int(found["Threads"])


class Client:
    """Asks until a time, and counts what comes of it."""

    def __init__(self, port: int, seed: int, counts: Counter[str]) -> None:
        self._port, self._random, self._counts = port, random.Random(seed), counts

    def run(self, until: float) -> None:
        while time.monotonic() < until:
            try:
                self._once()
            except OSError as error:
                self._counts[type(error).__name__] += 1

    def _once(self) -> None:
        drawn = self._random
        start = drawn.randrange(len(WORDS) - 400)
        text = " ".join(WORDS[start : start + drawn.randrange(5, 400)])
        stream, leaves = drawn.random() < 0.6, drawn.random() < 0.4
        body = {"messages": [{"role": "user", "content": text}], "max_tokens": drawn.randrange(1, 30)}
        data = json.dumps(body | {"stream": stream}).encode()
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(data)}\r\n"
        with socket.create_connection(("127.0.0.1", self._port)) as client:
            client.settimeout(300)
            client.sendall(
                f"{head}Content-Type: application/json\r\nConnection: close\r\n\r\n".encode() + data
            )
            if leaves:
                time.sleep(drawn.random() * 2)
                self._counts["left"] += 1
                return
            out = b""
            while part := client.recv(65536):
                out += part
        status = out[9:12].decode()
        whole = status != "200" or (b"[DONE]" if stream else b'"finish_reason"') in out
        self._counts[status if whole else "cut off"] += 1
        if status == "429":
            # as it was told
            time.sleep(drawn.random())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clients", type=int, default=100)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--every", type=float, default=15, help="seconds between two looks")
    parser.add_argument("server", nargs="*", help="options of the server, behind --")
    options = parser.parse_args()
    process, port = start(options.server or ["--budget", "64", "--memory", "50MB", "--queue", "200"])
    counts, end = Counter[str](), time.monotonic() + options.seconds
    clients = [
        threading.Thread(target=Client(port, seed, counts).run, args=(end,))
        for seed in range(options.clients)
    ]
    for client in clients:
        client.start()
    sizes = []
    while time.monotonic() < end:
        time.sleep(min(options.every, max(end - time.monotonic(), 0.1)))
        memory, threads = state(process)
        sizes.append(memory)
        left = max(end - time.monotonic(), 0)
        print(f"{left:5.0f} s left  {memory:7.1f} MB  {threads:3} threads  {dict(counts)}", flush=True)
    for client in clients:
        client.join()
    time.sleep(1)
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    connection.request("GET", "/metrics", headers={"Connection": "close"})
    lines = connection.getresponse().read().decode().splitlines()
    figures = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    left_over = sum(int(figures[f"mlx_kvret_{name}"]) for name in ("running", "waiting"))
    _, threads_after = state(process)
    process.terminate()
    ended = process.wait(60)
    settled = sizes[len(sizes) // 10 :]
    growth = max(settled[-3:]) / settled[0] - 1
    bad = sum(
        count for what, count in counts.items() if what[0] == "5" or not (what.isdigit() or what == "left")
    )
    print(
        f"memory {growth:+.1%}, {threads_after} threads, {left_over} requests left, exit {ended}, bad: {bad}"
    )
    print(f"{counts['200']} answered, {counts['left']} left, {counts['429']} told to come back")
    print(f"of {figures['mlx_kvret_prompt_tokens_total']} prompt tokens "
          f"{figures['mlx_kvret_cached_prompt_tokens_total']} were read before")  # fmt: skip
    return int(bool(bad or left_over or ended or growth > 0.02))


if __name__ == "__main__":
    sys.exit(main())
