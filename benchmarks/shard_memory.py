"""What `train --shard` saves: memory of one process, and of each of two that share the base, on a CPU.

python benchmarks/shard_memory.py        makes a random model of 400 MB and trains two steps

Prints a table, and writes it to benchmarks/results/shard_memory.md. The base is saved in half precision and
opened in float32: so its weights are the process's own memory, and not pages of a file that processes share.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import socket
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "shard_memory.md"
SIZES: dict[str, Any] = {
    "vocab_size": 16000, "hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12,
    "num_attention_heads": 12, "num_key_value_heads": 4, "max_position_embeddings": 256,
    "tie_word_embeddings": False,
}  # fmt: skip
TEXT = "remember Anna amber. Bob went home. what about Anna? amber. "


# what was freed goes back to the system at once, instead of being kept for later
TOLD = {"MALLOC_MMAP_THRESHOLD_": "65536"}


def resident(name: str = "RssAnon") -> int:
    """Bytes of this process's own memory; ``"VmHWM"`` is the most there ever was of all."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


def make(folder: Path) -> None:
    """The model, with the demo's tokenizer, and a text."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    from mlx_kvret.demo import MODEL

    torch.manual_seed(0)
    config = AutoConfig.for_model("llama", **SIZES)
    AutoModelForCausalLM.from_config(config).bfloat16().save_pretrained(folder / "model")
    AutoTokenizer.from_pretrained(MODEL).save_pretrained(folder / "model")
    (folder / "text.txt").write_text(TEXT * 40)


def work(folder: Path, count: int) -> None:
    """Train as one of ``count`` processes, and write down what it took beyond what was there before."""
    import torch
    import transformers

    from mlx_kvret.cuda_backend.training.engine import Engine, train
    from mlx_kvret.training.config import TrainConfig
    from mlx_kvret.training.records import Records
    from mlx_kvret.training.run import RunOptions

    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    found: dict[str, int] = {}
    stock = Engine.gradient

    def gradient(self: Engine, *args: Any) -> Any:
        losses = stock(self, *args)
        found["base"] = sum(weight.nbytes for weight in self.student.model.parameters())
        found["after"], found["most"] = resident() - before, resident("VmHWM") - whole
        return losses

    Engine.gradient = gradient  # type: ignore[method-assign]
    config = TrainConfig(width=16, length=64, budget=16, batch=2, steps=2, dtype="float32")
    records, options = Records([folder / "text.txt"]), RunOptions(folder / f"run-{count}", shard=count > 1)
    before, whole = resident(), resident("VmRSS")
    train(folder / "model", records, config, options)
    (folder / f"{count}-{os.environ.get('RANK', '0')}.json").write_text(json.dumps(found))


def launch(folder: Path, count: int) -> None:
    """``count`` processes on this machine."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = str(one.getsockname()[1])
    told = TOLD | {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    command = [sys.executable, __file__, str(folder), str(count)]
    started = [
        subprocess.Popen(command, env=os.environ | told | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(count)
    ]
    if any(process.wait() for process in started):
        sys.exit("a process has failed")


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make(folder)
        for count in (1, 2):
            launch(folder, count)
        lines = [
            "# Memory of a process that trains, by how many share the base",
            f"\n`python benchmarks/shard_memory.py`, {datetime.date.today()}, CPU ({platform.machine()}), "
            f"torch {version('torch')}, a llama of random weights in float32. `base`: its weights. The "
            "others are this process's memory beyond what was there before: its own after a step, and all "
            "of it at most, while the model was opened or in a step.\n",
            "| processes | rank | base | after a step | at most |\n|---|---|---|---|---|",
        ]
        for path in sorted(folder.glob("?-?.json")):
            found = json.loads(path.read_text())
            sizes = " | ".join(f"{size / 1e6:.0f} MB" for size in found.values())
            lines.append(f"| {path.stem[0]} | {path.stem[2]} | {sizes} |")
        text = "\n".join(lines) + "\n"
        print(text)
        RESULTS.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        work(Path(sys.argv[1]), int(sys.argv[2]))
    else:
        main()
