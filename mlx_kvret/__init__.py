"""Generate within a fixed KV memory budget, by learned eviction (arXiv 2605.09649).

>>> import mlx_kvret
>>> model, tokenizer = mlx_kvret.load("demo")
>>> mlx_kvret.generate(model, tokenizer, "remember Anna amber ... recall Anna", budget=64)

Importing this package imports neither MLX nor torch; the backend that is used comes with the first call.
"""

from .api import (
    attach,
    backends,
    detach,
    generate,
    load,
    load_cache,
    make_cache,
    save_cache,
    stream_generate,
)
from .batching import generate_batch, stream_batch
from .errors import KVRetError
from .inspecting import inspect
from .pipeline import pipeline
from .reading import answer, read

__all__ = [
    "KVRetError",
    "answer",
    "attach",
    "backends",
    "detach",
    "generate",
    "generate_batch",
    "inspect",
    "load",
    "load_cache",
    "make_cache",
    "pipeline",
    "read",
    "save_cache",
    "stream_batch",
    "stream_generate",
]
__version__ = "0.1.0"
