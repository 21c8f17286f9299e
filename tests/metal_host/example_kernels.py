"""Small well-known kernels, each with its twin: what the harness is tried on."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

FOLDER = Path(__file__).parent / "examples"


def source_of(name: str) -> str:
    return (FOLDER / f"{name}.metal").read_text()


@dataclass
class Example:
    """A kernel and a call of it. outputs: name -> (shape, dtype); grid and threadgroup in threads."""

    name: str
    inputs: dict[str, mx.array]
    outputs: dict[str, tuple[Sequence[int], mx.Dtype]]
    grid: tuple[int, int, int]
    threadgroup: tuple[int, int, int]
    twin: Callable[[], list[mx.array]]
    tol: float = 0.0
    template: list[tuple[str, Any]] = field(default_factory=list)
    init_value: float | None = None
    header: str = ""
    options: dict[str, bool] = field(default_factory=dict)

    def call(self, source: str | None = None, header: str | None = None, **changed: Any) -> list[mx.array]:
        """Launch the kernel, or the given variation of it."""
        kernel = mx.fast.metal_kernel(
            name=self.name,
            input_names=list(self.inputs),
            output_names=list(self.outputs),
            source=source_of(self.name) if source is None else source,
            header=self.header if header is None else header,
            **self.options,
        )
        how = {
            "output_shapes": [shape for shape, _ in self.outputs.values()],
            "output_dtypes": [dtype for _, dtype in self.outputs.values()],
            "grid": self.grid,
            "threadgroup": self.threadgroup,
            "template": self.template,
            "init_value": self.init_value,
        }
        return kernel(inputs=list(self.inputs.values()), **{**how, **changed})


_random = np.random.default_rng(11)


def normal(*shape: int, dtype: mx.Dtype = mx.float32) -> mx.array:
    return mx.array(_random.standard_normal(shape).astype(np.float32)).astype(dtype)


def row_sum() -> Example:
    x = normal(3, 50)
    outputs = {"out": ((3,), mx.float32)}
    return Example("row_sum", {"x": x}, outputs, (3 * 96, 1, 1), (96, 1, 1), lambda: [x.sum(axis=1)], 1e-5)


def softmax(dtype: mx.Dtype = mx.float32, tol: float = 1e-5) -> Example:
    x = (normal(70, 1001) * 4 - 200).astype(dtype)
    call = {"x": x}, {"out": (x.shape, dtype)}, (70 * 64, 1, 1), (64, 1, 1)
    return Example("softmax", *call, lambda: [mx.softmax(x, axis=-1, precise=True)], tol, [("T", dtype)])


def attention(lengths: Sequence[int] = (67, 0, 3)) -> Example:
    heads, groups, size, simdgroups = len(lengths) * 2, 2, 64, 4
    q = normal(heads, size, dtype=mx.float16)
    keys, values = (normal(sum(lengths), size, dtype=mx.float16) for _ in range(2))
    ends = np.cumsum([0, *lengths])

    def twin() -> list[mx.array]:
        out = []
        for h in range(heads):
            own = slice(*map(int, ends[h // groups : h // groups + 2]))
            k, v = (a[own].astype(mx.float32) for a in (keys, values))
            weights = mx.softmax(k @ q[h].astype(mx.float32) * size**-0.5)
            out.append(weights @ v if k.size else mx.zeros(size))
        return [mx.stack(out).astype(mx.float16)]

    inputs = {
        "q": q,
        "keys": keys,
        "values": values,
        "offsets": mx.array(ends.astype(np.int32)),
        "scale": mx.array(size**-0.5),
    }
    template = [("D", size), ("G", groups), ("SG", simdgroups)]
    width = simdgroups * 32
    call = inputs, {"out": (q.shape, mx.float16)}, (heads * width, 1, 1), (width, 1, 1)
    return Example("attention", *call, twin, 1e-3, template)


def select(n: int = 500, k: int = 41) -> Example:
    scores = normal(n)
    scores[3::7] = mx.sort(scores)[-k + 2]  # many ties at the threshold

    def twin() -> list[mx.array]:
        order = np.lexsort((np.arange(n), -np.array(scores)))
        keep = np.zeros(n, np.uint8)
        keep[order[:k]] = 1
        return [mx.array(keep)]

    call = {"scores": scores, "k": mx.array(k)}, {"keep": ((n,), mx.uint8)}, (128, 1, 1), (128, 1, 1)
    return Example("select", *call, twin, header=source_of("select_header"))


def compact(n: int = 300, width: int = 8) -> Example:
    rows, flags = normal(n, width, dtype=mx.float16), mx.array((_random.random(n) < 0.4).astype(np.uint8))
    stay = np.flatnonzero(np.array(flags))

    def twin() -> list[mx.array]:
        return [rows[mx.array(stay)], mx.array(stay.astype(np.int32)), mx.array([len(stay)], dtype=mx.int32)]

    outputs = {
        "out": ((len(stay), width), mx.float16),
        "index": ((len(stay),), mx.int32),
        "count": ((1,), mx.int32),
    }
    call = {"rows": rows, "flags": flags}, outputs, (96, 1, 1), (96, 1, 1)
    return Example("compact", *call, twin, template=[("W", width)])


def scan(n: int = 150) -> Example:
    lengths = _random.integers(0, 1 << 30, n, dtype=np.int32)
    ends = np.cumsum(lengths, dtype=np.int64)
    call = {"lengths": mx.array(lengths)}, {"offsets": ((n,), mx.int64)}, (64, 1, 1), (64, 1, 1)
    return Example("scan", *call, lambda: [mx.array(ends - lengths)], template=[("WIDTH", 64)])


def transpose() -> Example:
    x = normal(45, 70, dtype=mx.bfloat16)
    call = {"x": x}, {"out": ((70, 45), mx.bfloat16)}, (96, 16, 1), (32, 8, 1)
    return Example("transpose", *call, lambda: [mx.contiguous(x.T)], template=[("T", mx.bfloat16)])


def matmul() -> Example:
    a, b = normal(16, 40, dtype=mx.float16), normal(40, 24, dtype=mx.float16)
    call = {"a": a, "b": b}, {"out": ((16, 24), mx.float32)}, (3 * 32, 2, 1), (32, 1, 1)
    return Example("matmul", *call, lambda: [a.astype(mx.float32) @ b.astype(mx.float32)], 1e-5)


def histogram(bins: int = 20) -> Example:
    x = mx.array(_random.random(700).astype(np.float32))

    def twin() -> list[mx.array]:
        which = np.minimum((np.array(x) * bins).astype(int), bins - 1)
        return [mx.array(np.bincount(which, minlength=bins).astype(np.uint32))]

    call = {"x": x}, {"counts": ((bins,), mx.uint32)}, (700, 1, 1), (64, 1, 1)
    options = {"atomic_outputs": True}
    return Example("histogram", *call, twin, template=[("BINS", bins)], init_value=0, options=options)


def strided_exp() -> Example:
    x = normal(6, 8, 5).transpose(2, 0, 1)[::2, :, ::3]
    call = {"x": x}, {"out": (x.shape, mx.float32)}, (x.size, 1, 1), (32, 1, 1)
    return Example("strided_exp", *call, lambda: [mx.exp(x)], 1e-6, options={"ensure_row_contiguous": False})


def _sample(x: mx.array, points: mx.array) -> mx.array:
    """(B, H, W, C) and (B, P, 2) as (x, y) -> (B, P, C)."""
    height, width = x.shape[1:3]
    image = mx.arange(x.shape[0])[:, None]
    out = mx.zeros((*points.shape[:2], x.shape[3]))
    for dy in (0, 1):
        for dx in (0, 1):
            corner = mx.stop_gradient(mx.floor(points)) + mx.array([dx, dy])
            near = 1 - mx.abs(points - corner)
            px, py = corner[..., 0].astype(mx.int32), corner[..., 1].astype(mx.int32)
            inside = (px >= 0) & (px < width) & (py >= 0) & (py < height)
            value = x[image, mx.clip(py, 0, height - 1), mx.clip(px, 0, width - 1)]
            out = out + (near[..., 0] * near[..., 1] * inside)[..., None] * value
    return out


def _images() -> tuple[mx.array, mx.array]:
    points = mx.array((_random.random((2, 30, 2)) * 9 - 1.5).astype(np.float32))
    return normal(2, 5, 7, 37), points


def bilinear() -> Example:
    x, points = _images()
    n = 2 * 30 * 37
    call = {"x": x, "points": points}, {"out": ((2, 30, 37), mx.float32)}, (n, 1, 1), (256, 1, 1)
    return Example("bilinear", *call, lambda: [_sample(x, points)], 1e-5)


def bilinear_grad() -> Example:
    x, points = _images()
    cotangent = normal(2, 30, 37)
    inputs = {"x": x, "points": points, "cotangent": cotangent}
    outputs = {"x_grad": (x.shape, mx.float32), "points_grad": (points.shape, mx.float32)}
    call = inputs, outputs, (2 * 30 * 32, 1, 1), (128, 1, 1)

    def twin() -> list[mx.array]:
        return mx.vjp(_sample, [x, points], [cotangent])[1]

    return Example("bilinear_grad", *call, twin, 1e-4, init_value=0, options={"atomic_outputs": True})


ALL = [
    row_sum,
    softmax,
    attention,
    select,
    compact,
    scan,
    transpose,
    matmul,
    histogram,
    strided_exp,
    bilinear,
    bilinear_grad,
]
