"""Operations of a decoding step: as transformers runs it, compiled between attentions, with liger-kernel.

    python benchmarks/step_operations.py [--write]

Counted without a GPU on a model of Qwen3-4B's depth and of bfloat16, but narrow: operations of torch that do
work, views left out, attention and what belongs to it taken as the four kernels it is on a GPU. Compiled ones
are counted in the graph that torch hands to its compiler for one layer, with all that stands between two
products or attentions as one kernel, which is what inductor makes of it. liger-kernel's are arithmetic: one
kernel for each norm, rotation and activation, the rest as it is.
"""

from __future__ import annotations

import argparse
import collections
import datetime
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch._dynamo.backends.common import aot_autograd
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Qwen3Config, Qwen3ForCausalLM

from mlx_kvret.core.config import EvictionConfig
from mlx_kvret.cuda_backend import compiling, fixed, hooks
from mlx_kvret.cuda_backend.cache import cache_argument
from mlx_kvret.cuda_backend.recording import Called
from mlx_kvret.cuda_backend.step import FixedStep

RESULTS = Path(__file__).parent / "results" / "step_operations.md"
# what moves no data, or only says what is already there
VIEWS = {
    "view", "_unsafe_view", "transpose", "t", "unsqueeze", "expand", "slice", "select", "alias", "permute",
    "reshape", "squeeze", "detach", "split", "unbind", "as_strided", "lift_fresh", "flatten", "unflatten",
}  # fmt: skip
PRODUCTS = {"mm", "addmm", "bmm", "linear", "matmul"}
# of a layer on a GPU: the gate input, keys and values, attention, and its merge
OURS = 4
# what a layer of Qwen3 has of each, and of what else: products, sums with the residual
NORMS, ROTATIONS, ACTIVATIONS, REST = 4, 1, 1, 7 + 2


class Counted(TorchDispatchMode):
    """Notes operations that do work, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.on = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.split("::")[1]
        if self.on and name not in VIEWS:
            self.names.append(name)
        return func(*args, **(kwargs or {}))


def kernels(names: Iterable[str]) -> int:
    """Products and attentions, and one kernel for all other work between two of them."""
    found, between = 0, False
    for name in names:
        if name in PRODUCTS or name == "attend":
            found, between = found + (OURS if name == "attend" else 1), False
        elif name not in VIEWS:
            found, between = found + (not between), True
    return found


def build(layers: int) -> tuple[Any, FixedStep]:
    """A narrow model, and a step of one row that has read a few tokens."""
    torch.manual_seed(0)
    config = Qwen3Config(
        num_hidden_layers=layers, hidden_size=64, intermediate_size=96, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, vocab_size=64,
    )  # fmt: skip
    model: Any = Qwen3ForCausalLM._from_config(config, dtype=torch.bfloat16).eval().requires_grad_(False)
    made = hooks.install(model, None, {"model": ""}, {"policy": "recent"})
    cache = hooks.new_cache(model, made, EvictionConfig.create(16, 8, policy="recent"))
    with torch.no_grad():
        model(torch.zeros(1, 24, dtype=torch.long), **cache_argument(model, cache))
    return model, FixedStep(model, cache, Called)


def eager(layers: int) -> collections.Counter[str]:
    """Operations of a step as they are; those inside of attention are left out and counted as ours."""
    _, step = build(layers)
    token, noted = torch.zeros(1, 1, dtype=torch.long), Counted()
    step(token, torch.clone)
    attend, update = fixed.FixedLayer.attend, fixed.FixedLayer.update

    def silent(function: Any) -> Any:
        def call(*args: Any, **given: Any) -> Any:
            noted.on = False
            try:
                return function(*args, **given)
            finally:
                noted.on = True

        return call

    fixed.FixedLayer.attend, fixed.FixedLayer.update = silent(attend), silent(update)  # type: ignore[method-assign]
    try:
        with noted:
            step(token, lambda logits: logits)
    finally:
        fixed.FixedLayer.attend, fixed.FixedLayer.update = attend, update  # type: ignore[method-assign]
    return collections.Counter(noted.names)


def compiled() -> int:
    """Kernels of one compiled layer."""
    graphs: list[list[str]] = []

    def note(graph: Any, inputs: Any) -> Any:
        called = [node.target for node in graph.graph.nodes if node.op == "call_function"]
        graphs.append([c._schema.name.split("::")[1] for c in called if hasattr(c, "_schema")])
        return graph.forward

    model, step = build(2)
    vars(model)["_kvret_compile"] = True
    step._compile = True
    before, compiling.BACKEND = compiling.BACKEND, aot_autograd(fw_compiler=note)
    try:
        step(torch.zeros(1, 1, dtype=torch.long), torch.clone)
    finally:
        compiling.BACKEND = before
    (graph,) = graphs
    assert not step.failed and step._compile and graph.count("attend") == 1
    return kernels(graph)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=36, help="of the model (36)")
    parser.add_argument("--write", action="store_true", help="write the table to benchmarks/results")
    options = parser.parse_args()
    layers = options.layers
    one, two = (sum(eager(n).values()) for n in (1, 2))
    each, outside = two - one, 2 * one - two
    whole = sum((counts := eager(layers)).values())
    assert whole == outside + layers * each, "layers differ"
    liger = NORMS + ROTATIONS + ACTIVATIONS + REST
    rows = {
        "as transformers runs it": (each + OURS, whole + layers * OURS),
        "with liger-kernel": (liger + OURS, outside + layers * (liger + OURS)),
        "compiled between attentions": (own := compiled(), outside + layers * own),
    }
    usual = ", ".join(f"{count} {name}" for name, count in counts.most_common(8))
    lines = [
        "# Operations of a decoding step",
        "",
        f"`python benchmarks/step_operations.py --write`, {datetime.date.today()}, torch {torch.__version__}"
        f", {layers} layers of Qwen3 in bfloat16, one row, counted on a CPU; {outside} operations outside of "
        f"the layers, {OURS} of each layer are this library's.",
        "",
        "| step | of a layer | in all |",
        "|--|--|--|",
        *(f"| {name} | {layer} | {total:,} |" for name, (layer, total) in rows.items()),
        "",
        f"Most of what transformers runs: {usual}.",
    ]
    text = "\n".join(lines) + "\n"
    print(text)
    if options.write:
        RESULTS.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
