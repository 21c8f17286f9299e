"""Logits of every family that transformers and mlx-lm share, with every kind of RoPE, against transformers.

    python benchmarks/reliability/families.py [FAMILY ...]

Prints a table: the largest difference relative to the largest logit, or why a model is refused, or why
transformers cannot make or run it.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import warnings
from pathlib import Path

import mlx.core as mx
import mlx_lm
import numpy as np
import torch
import transformers
from mlx_lm.utils import MODEL_REMAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

sys.path.append(str(Path(__file__).parents[2] / "tests"))
from cross.families import FAMILIES, KINDS, LENGTH, stock

import mlx_kvret
from mlx_kvret.errors import KVRetError


def compared(family: str, kind: str) -> str:
    """One cell of the table."""
    ids = np.random.default_rng(0).integers(1, 128, (1, LENGTH))
    with tempfile.TemporaryDirectory() as folder:
        try:
            with torch.no_grad():
                expected = stock(family, kind, Path(folder))(torch.from_numpy(ids)).logits[0].numpy()
        except Exception as error:
            return f"no model: {type(error).__name__}: {str(error).strip().splitlines()[0][:90]}"
        try:
            length = {"rope_length": LENGTH} if kind in ("longrope", "dynamic") else {}
            model, _ = mlx_kvret.load(folder, backend="mlx", **length)
            cache = mlx_kvret.make_cache(model, budget=64, policy="recent")
            chunks = [model(mx.array(part), cache=cache)[0] for part in np.split(ids, [20, 40, 41], 1)]
            found = np.concatenate([np.array(chunk.astype(mx.float32)) for chunk in chunks])
        except KVRetError as error:
            return f"refused: {str(error).splitlines()[0]}"
    return f"{abs(found - expected).max() / abs(expected).max():.1e}"


def left_out() -> list[str]:
    """Families that both libraries know and that are not walked."""
    known = {path.stem for path in Path(mlx_lm.__file__).parent.glob("models/*.py")}
    shared = {name for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if MODEL_REMAPPING.get(name, name) in known}
    return sorted(shared - set(FAMILIES))


def main() -> None:
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    parser.add_argument("families", nargs="*", metavar="FAMILY", help="all unless given")
    chosen = parser.parse_args().families or FAMILIES
    if unknown := set(chosen) - set(FAMILIES):
        parser.error(f"not known here: {', '.join(sorted(unknown))}; there are {', '.join(FAMILIES)}")
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    for family in chosen:
        for kind in KINDS:
            cell = compared(family, kind)
            print(f"{family:18} {kind:16} {cell}", flush=True)
            if cell.startswith("no model: ValueError: no RoPE settings"):
                break
    print("known to both and not walked:", ", ".join(left_out()))


if __name__ == "__main__":
    main()
