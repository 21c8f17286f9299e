"""Ordinary tensors for what a cache keeps, whatever mode its caller runs in."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


def ordinary(function: Callable[P, R]) -> Callable[P, R]:
    """Run a function without gradients and outside of ``torch.inference_mode``.

    What is made in that mode cannot be changed in place after it, and a cache lives longer than a call.
    """

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        if not (torch.is_inference_mode_enabled() or torch.is_grad_enabled()):
            return function(*args, **kwargs)
        with torch.inference_mode(False), torch.no_grad():
            return function(*args, **kwargs)

    return run
