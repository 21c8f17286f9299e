"""Faults planted in the example kernels: one textual change each, and the pass that must notice it."""

from dataclasses import dataclass

BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup);"


@dataclass(frozen=True)
class Mutant:
    """`old`, which the source must contain, becomes `new`; `nth` counts from 0, -1 is the last."""

    example: str
    fault: str
    old: str
    new: str
    found_by: str
    nth: int = 0

    def apply(self, source: str) -> str:
        parts = source.split(self.old)
        at = self.nth if self.nth >= 0 else len(parts) - 1 + self.nth
        assert 0 <= at < len(parts) - 1, f"{self.example} doesn't contain {self.old!r}"
        return self.old.join(parts[: at + 1]) + self.new + self.old.join(parts[at + 1 :])

    def __str__(self) -> str:
        return f"{self.example}: {self.fault}"


def _of(example: str, *rows: tuple) -> list[Mutant]:
    return [Mutant(example, *row) for row in rows]


MUTANTS = [
    *_of(
        "row_sum",
        ("loop runs one past the row", "i < n;", "i <= n;", "asan"),
        ("missing barrier", BARRIER, "", "tsan"),
        ("barrier that orders nothing", "mem_threadgroup", "mem_none", "tsan"),
        ("barrier for the wrong memory", "mem_threadgroup", "mem_device", "tsan"),
        (
            "simdgroup barrier instead of threadgroup barrier",
            "threadgroup_barrier",
            "simdgroup_barrier",
            "tsan",
        ),
        ("threadgroup array too small", "partial[32]", "partial[2]", "asan"),
        ("reads unwritten threadgroup memory", "lane < simdgroups_per_threadgroup ?", "lane < 32 ?", "tsan"),
        ("wrong identity of the sum", ": 0.0f;", ": 1.0f;", "run"),
        ("all lanes store", "if (lane == 0) out[row]", "out[row]", "tsan"),
        ("private array instead of threadgroup", "threadgroup float partial", "float partial", "run"),
        ("uninitialised local", "float sum = 0.0f;", "float sum;", "types"),
        (
            "early return before a simdgroup function",
            "float sum = 0.0f;",
            "float sum = 0.0f; if (tid >= n) return;",
            "run",
        ),
        ("early return of a simdgroup before a barrier", BARRIER, f"if (sg == 2) return;\n{BARRIER}", "run"),
        ("barrier in a branch that some lanes take", BARRIER, f"if (lane < 16) {BARRIER}", "run"),
        ("barrier in a branch that some simdgroups take", BARRIER, f"if (sg < 2) {BARRIER}", "run"),
        ("threadgroup variable with an initialiser", "partial[32]", "partial[32] = {0}", "types"),
        ("double precision", "float sum =", "double sum =", "types"),
        ("device memory used between threads without a barrier", BARRIER, "out[row] = 0.0f;", "tsan"),
        ("writes to an input", "if (lane == 0) out[row] = sum;", "x[row] = sum;", "types"),
        (
            "threadgroup memory beyond 32 KiB",
            "partial[32];",
            "partial[32], large[8200]; large[0] = 0.0f;",
            "run",
        ),
    ),
    *_of(
        "softmax",
        (
            "maximum not subtracted",
            "float(x[start + i]) - highest) / sum",
            "float(x[start + i])) / sum",
            "run",
        ),
        ("wrong identity of the maximum", "float highest = -INFINITY;", "float highest = 0.0f;", "run"),
        ("shared memory overwritten while others read it", BARRIER, "", "tsan", 1),
        ("offset in 16 bits", "const uint start = row * n;", "const ushort start = row * n;", "tsan"),
        ("max of float and int", "max(highest, float(x[start + i]))", "max(highest, 0)", "types"),
        ("std::", "= max(", "= std::max(", "types"),
        ("misspelt name", "fast::exp", "fast::expp", "types"),
    ),
    *_of(
        "attention",
        ("one entry too many", "t < end;", "t <= end;", "asan"),
        ("one entry too few", "t < end;", "t < end - 1;", "run"),
        ("wrong query group", "offsets[head / G]", "offsets[head / (G + 1)]", "run"),
        ("sum not rescaled", "sum = sum * fade + weight", "sum = sum + weight", "run"),
        ("values not rescaled", "acc[i] * fade + weight", "acc[i] + weight", "run"),
        ("lanes with different trip counts", "t < end;", "t < end - int(lane % 2);", "run"),
        (
            "simdgroup function in a divergent branch",
            "logit = simd_sum(logit);",
            "if (lane < 31) logit = simd_sum(logit);",
            "run",
        ),
        ("pointer without an address space", "const device half* key", "const half* key", "types"),
        (
            "pointer into the wrong address space",
            "const device half* key",
            "const threadgroup half* key",
            "types",
        ),
        ("pointer of the wrong element type", "const device half* key", "const device float* key", "types"),
        ("missing barrier before the merge", BARRIER, "", "tsan"),
        ("unwritten threadgroup memory", "  sum_of[sg] = sum;\n", "", "tsan"),
        ("threadgroup index out of bounds", "highest_of[sg] =", "highest_of[sg + 1] =", "asan"),
        (
            "inner index runs into the next row",
            "values_of[sg][lane * E + i]",
            "values_of[sg][lane * E + i + 1]",
            "asan",
        ),
        ("empty head divided by zero", "total > 0.0f ? merged / total : 0.0f", "merged / total", "run"),
        ("stores past the output", "out[head * D + d]", "out[head * D + d + 1]", "asan"),
        (
            "lambda",
            "float highest = -INFINITY;",
            "float highest = -INFINITY; auto f = [&](float x) { return x; };",
            "types",
        ),
    ),
    *_of(
        "select",
        ("tie rule dropped", "tie && seen + before + earlier < allowed", "tie", "run"),
        ("ties of earlier blocks forgotten", "  seen += simd_sum(of_lane);\n", "", "run"),
        ("histogram zeroed while others count", BARRIER, "", "tsan"),
        ("threshold read before it is found", BARRIER, "", "tsan", 2),
        ("shift by 32", "key >> uint(shift)", "key >> uint(shift + 32)", "asan"),
        (
            "plain variable for an atomic",
            "threadgroup atomic_uint histogram",
            "threadgroup uint histogram",
            "types",
        ),
        (
            "plain read of an atomic",
            "atomic_load_explicit(&histogram[bin], memory_order_relaxed)",
            "histogram[bin]",
            "types",
        ),
        ("memory order Metal lacks", "memory_order_relaxed", "memory_order_seq_cst", "types"),
        ("rank still wanted not carried over", "found[1] = wanted - before;", "found[1] = wanted;", "run"),
    ),
    *_of(
        "compact",
        ("missing last barrier of the loop", BARRIER, "", "tsan", -1),
        ("base not advanced", "  base += simd_sum(of_lane);\n", "", "tsan"),
        (
            "inclusive instead of exclusive",
            "within = simd_prefix_exclusive_sum",
            "within = simd_prefix_inclusive_sum",
            "asan",
        ),
        ("vector of the wrong width", "((device half4*)out)", "((device float4*)out)", "types"),
        ("count stored by every thread", "if (tid == 0) count", "count", "tsan"),
        ("index past the flags", "row < n && flags[row]", "flags[row]", "asan"),
    ),
    *_of(
        "scan",
        ("offsets in 32 bits", "long base = 0;", "int base = 0;", "run"),
        ("sums in 32 bits", "threadgroup long sums", "threadgroup int sums", "asan"),
        ("in place, without a second buffer", "sums[1 - from][tid] =", "sums[from][tid] =", "tsan"),
        ("carry read after it is overwritten", BARRIER, "", "tsan", -1),
        ("reads before the first element", "tid >= step ?", "tid + 1 >= step ?", "asan"),
    ),
    *_of(
        "transpose",
        ("missing barrier", BARRIER, "", "tsan"),
        ("edge of the tile not checked", "corner.y + dy < rows && ", "", "asan"),
        ("row and column exchanged", "tile[at.x][dx]", "tile[dx][at.x]", "tsan"),
        ("tile too narrow", "tile[32][33]", "tile[32][31]", "asan"),
        ("float stored as bfloat", "= tile[at.x][dx]", "= float(tile[at.x][dx]) * 1.0f", "types"),
        ("wrong number of components", "threadgroup_position_in_grid.xy * 32", "uint2(1, 2, 3)", "types"),
    ),
    *_of(
        "matmul",
        ("wrong stride", "b + k * n + corner.x, n)", "b + k * n + corner.x, inner)", "asan"),
        (
            "sum forgotten",
            "left, right, sum);",
            "left, right, make_filled_simdgroup_matrix<float>(0.0f));",
            "run",
        ),
        ("operands exchanged", "sum, left, right", "sum, right, left", "run"),
    ),
    *_of(
        "histogram",
        ("own histogram not zeroed in time", BARRIER, "", "tsan"),
        (
            "bin of the last value",
            "min(uint(x[i] * float(BINS)), uint(BINS - 1))",
            "uint(x[i] * float(BINS)) + 1u",
            "asan",
        ),
        (
            "store instead of add",
            "atomic_fetch_add_explicit(&counts[b]",
            "atomic_store_explicit(&counts[b]",
            "run",
        ),
        (
            "plain addition to an atomic",
            "atomic_fetch_add_explicit(&counts[b], mine, memory_order_relaxed)",
            "counts[b] += mine",
            "types",
        ),
        ("not all bins written out", "if (mine)", "if (mine > 1)", "run"),
    ),
    *_of(
        "bilinear",
        ("reads beyond the image", "px >= 0 && px < width && ", "", "asan"),
        ("images of the batch mixed up", "(image * height + py)", "(py)", "run"),
    ),
    *_of(
        "bilinear_grad",
        (
            "race between points that share a pixel",
            "atomic_fetch_add_explicit(&x_grad[at], near.x * near.y * g, memory_order_relaxed)",
            "((device float*)x_grad)[at] += near.x * near.y * g",
            "tsan",
        ),
        ("slope of one lane only", "slope = simd_sum(slope);", "", "run"),
        (
            "threads leave before the simdgroup function",
            "float2 slope = 0.0f;",
            "float2 slope = 0.0f; if (lane >= 5) return;",
            "run",
        ),
    ),
]
