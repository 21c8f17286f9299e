"""How far rounding may take results apart, by the size of what was summed: alike on every processor.

An absolute tolerance holds on the machine it was tried on. Where terms cancel, as in a gradient that is
exactly 0, all that is left is the rounding of the terms, which depends on the order of summing.
"""

from __future__ import annotations

from typing import Any

import numpy as np

# from 1 to the next number
EPS = {"float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}


def assert_near(
    found: Any, expected: Any, roundings: float, size: Any = None, dtype: str = "float32"
) -> None:
    """``found`` is ``expected`` but for so many roundings, each of a number of ``size``.

    Args:
        found, expected: numbers, or arrays of one shape of numpy, torch or MLX.
        roundings: about the number of operations one after the other, with room for another order.
        size: what was summed, Σ|terms|, for all or for each element; the largest |expected| unless given.
        dtype: the type that was rounded to.
    """
    found, expected = float64(found), float64(expected)
    assert found.shape == expected.shape, f"shape {found.shape}, expected {expected.shape}"
    finite = np.isfinite(expected)
    np.testing.assert_array_equal(found[~finite], expected[~finite])
    size = np.abs(expected[finite]).max(initial=0) if size is None else float64(size)
    allowed = np.broadcast_to(EPS[dtype] * np.asarray(size), expected.shape)[finite]
    with np.errstate(divide="ignore", invalid="ignore"):
        off = np.abs(found[finite] - expected[finite])
        made = np.where(off == 0, 0, off / allowed)
    # NaN is not below either
    worst = f"{made.max(initial=0):.3g} roundings of {dtype} apart, {roundings:g} are allowed"
    assert (made <= roundings).all(), f"{worst}: largest difference {off.max():.3g}"


def assert_norm_near(
    found: Any, expected: Any, relative: float, terms: Any, roundings: float = 8, dtype: str = "float32"
) -> None:
    """The norm of the difference is below ``relative`` that of ``expected``, plus roundings of the ``terms``.

    ``terms`` (like ``expected``) are the sizes of what was summed to each element: where all of it cancels
    they alone say how much may be left.
    """
    found, expected, terms = float64(found), float64(expected), float64(terms)
    assert found.shape == expected.shape == terms.shape
    allowed = relative * np.linalg.norm(expected) + roundings * EPS[dtype] * np.linalg.norm(terms)
    off = np.linalg.norm(found - expected)
    assert off <= allowed, f"the difference has norm {off:.3g}, {allowed:.3g} is allowed"


def float64(x: Any) -> np.ndarray:
    """A number, or an array of numpy, torch or MLX, in float64."""
    if hasattr(x, "detach"):
        return x.detach().double().cpu().numpy()
    if type(x).__module__.startswith("mlx"):
        import mlx.core as mx

        x = x.astype(mx.float32) if x.dtype == mx.bfloat16 else x
    return np.array(x).astype(np.float64)
