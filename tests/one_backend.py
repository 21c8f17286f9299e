"""Run the commands with some packages blocked: ``python one_backend.py FOLDER mlx,mlx_lm``.

Prints a line for each command that came to its end, and which of the backends' packages were loaded.
"""

import json
import sys
from importlib.machinery import PathFinder
from pathlib import Path

# this folder has one of the same name as a package of ours
sys.path.pop(0)
FOLDER, BLOCKED = Path(sys.argv[1]), set(sys.argv[2].split(","))
_find = PathFinder.find_spec


def find_spec(name, path=None, target=None):
    """As if the blocked packages were in no folder."""
    return None if name.partition(".")[0] in BLOCKED else _find(name, path, target)


PathFinder.find_spec = staticmethod(find_spec)

import mlx_kvret  # noqa: E402
from mlx_kvret import demo  # noqa: E402
from mlx_kvret.cli import convert, eval, generate, info, train  # noqa: E402

STORY = "remember Ada amber remember Ivan copper"
CHAT = [{"role": "user", "content": f"{STORY} recall Ada"}, {"role": "assistant", "content": "amber"}]
(FOLDER / "chats.jsonl").write_text((json.dumps({"messages": CHAT}) + "\n") * 8)
GENERATE = "--model demo --budget 16 --max-tokens 3"
EVAL = "--model demo --task facts --length 192 --samples 1 --budget 16 --quiet"
TRAIN = "--width 8 --budget 4 --length 32 --batch 1 --steps 2 --device cpu"
COMMANDS = [
    (info, ["demo"]),
    (info, [demo.GATES]),
    (convert, [demo.GATES, FOLDER / "stacked", "--to", "torch"]),
    (convert, [demo.GATES, FOLDER / "half", "--to", "shared", "--dtype", "bfloat16"]),
    (generate, [*GENERATE.split(), "--prompt", f"{STORY} recall Ivan"]),
    (eval, [*EVAL.split(), "--out", FOLDER / "results.jsonl"]),
    (train, ["demo", *TRAIN.split(), "--data", FOLDER / "chats.jsonl", "--output", FOLDER / "run"]),
]

print("backend", mlx_kvret.api.choose_backend("auto"))
for module, arguments in COMMANDS:
    module.command.main([str(argument) for argument in arguments], standalone_mode=False)
    print("done", module.__name__.rpartition(".")[2])
print("loaded", *sorted({"mlx", "mlx_lm", "torch"} & sys.modules.keys()))
