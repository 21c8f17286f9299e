"""Several real processes on this machine, with a time limit for all of them."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).parent


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens at now."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def ring(size: int, folder: Path) -> list[dict[str, str]]:
    """What MLX's ring wants in the environment of each rank."""
    hosts = folder / "hosts.json"
    hosts.write_text(json.dumps([[f"127.0.0.1:{port}"] for port in free_ports(size)]))
    return [{"MLX_RANK": str(rank), "MLX_HOSTFILE": str(hosts)} for rank in range(size)]


def gloo(size: int, folder: Path) -> list[dict[str, str]]:
    """What torch's processes want in the environment of each rank."""
    (port,) = free_ports(1)
    told = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(size)}
    return [told | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(size)]


def run(
    command: Sequence[str], told: Sequence[dict[str, str]], limit: float = 200, wait: float = 60
) -> list[subprocess.CompletedProcess[str]]:
    """The same command in a process for each rank; who is not done after ``limit`` seconds is killed.

    ``wait`` is how many seconds a rank waits for another.
    """
    base = os.environ | {"MLX_KVRET_RANK_TIMEOUT": str(wait), "PYTHONPATH": str(HERE.parents[1])}
    started = [
        subprocess.Popen(
            [sys.executable, *command], env=base | own, text=True, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for own in told
    ]  # fmt: skip
    end, done = time.monotonic() + limit, []
    for process in started:
        try:
            out, error = process.communicate(timeout=max(0.1, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            out, error = process.communicate()
        done.append(subprocess.CompletedProcess(process.args, process.returncode, out, error))
    return done
