"""One forward pass of a bounded model: it is begun, and then part of the cache or undone.

A model's ``forward`` and its decoder's are wrapped, for hooks of torch do not see interrupts, and the decoder
does not see what fails in the model's head. The outermost of the two makes the transaction.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from types import MethodType
from typing import Any

from torch import nn

from .cache import BoundedCache, running
from .fixed import FixedCache

Begin = Callable[[nn.Module, BoundedCache, Any, dict[str, Any]], None]
_STOCK = "_kvret_forward"


def wrap(module: nn.Module, check: Begin | None, begin: Begin | None) -> None:
    """Have forward passes of a module with a bounded cache whole or not at all.

    ``check`` is called before a pass is begun, ``begin`` when it is, where the module is the decoder.
    """
    stock = module.forward
    signature = inspect.signature(stock)
    own = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)

    @functools.wraps(stock)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        inner = vars(self).get(_STOCK) or MethodType(type(self).forward, self)
        if any(isinstance(v, FixedCache) for v in (*args, *kwargs.values())):
            # who repeats the step keeps the accounts
            return inner(*args, **kwargs)
        cache = next((v for v in (*args, *kwargs.values()) if isinstance(v, BoundedCache)), None)
        outer = running.set(cache)
        try:
            if cache is not None and check is not None:
                check(self, cache, args, kwargs)

            def call() -> Any:
                if cache is not None and begin is not None:
                    begin(self, cache, args, kwargs)
                return inner(*args, **kwargs)

            return call() if cache is None or cache.in_pass else cache.run(call)
        finally:
            running.reset(outer)

    forward.__signature__ = signature.replace(  # type: ignore[attr-defined]
        parameters=[own, *signature.parameters.values()]
    )
    if "forward" in vars(module):
        vars(module)[_STOCK] = vars(module)["forward"]
    vars(module)["forward"] = MethodType(forward, module)


def unwrap(module: nn.Module) -> None:
    """Undo :func:`wrap`."""
    vars(module).pop("forward", None)
    if _STOCK in vars(module):
        vars(module)["forward"] = vars(module).pop(_STOCK)
