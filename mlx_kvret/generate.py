"""``python -m mlx_kvret.generate``: the command ``mlx-kvret generate``, as users of mlx-lm expect.

The package's function of the same name stays callable even after someone has imported this module.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

from .api import generate, stream_generate

__all__ = ["generate", "stream_generate"]


class _Callable(ModuleType):
    def __call__(self, *args: Any, **options: Any) -> str:
        return generate(*args, **options)


sys.modules[__name__].__class__ = _Callable

if __name__ == "__main__":
    from mlx_kvret.cli import generate_main

    generate_main()
