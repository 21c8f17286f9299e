"""Faults planted in the kernels: one textual change each, and the call that must notice it.

``PYTHONPATH=tests python -m tests.kernels.mutants`` tries all of them; the tests try some.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from unittest.mock import patch

import mlx.core as mx
import numpy as np
from metal_host import KernelError, check

from mlx_kvret.mlx_backend.candidates import candidates_kernel, candidates_reference
from mlx_kvret.mlx_backend.kernels import compaction_plan, decode_attention, launch, score_select
from mlx_kvret.mlx_backend.kernels.attention import attend
from mlx_kvret.mlx_backend.kernels.launch import rows as host_rows
from mlx_kvret.mlx_backend.kernels.prefill_attention import chunk_rows, tiled, tiled_rows
from mlx_kvret.mlx_backend.pool import destinations_reference
from mlx_kvret.mlx_backend.selection import select_reference

from .cases import batch_with, pool_with, uniform, view_with
from .test_attention import TOLERANCE, exact
from .test_chunks import RAGGED, chunks_with, one_by_one, queries_for


def _rows(size, group, dtype=mx.float32, bits=None, sinks=False):
    """Two rows of a batch, ragged, one of them with an empty head."""
    view = batch_with([[590, 0, 9], [1, 320, 3]], [3, 5], size, dtype, bits)
    return (
        view,
        uniform(2, 3 * group, 1, size, dtype=dtype) * 3,
        attend,
        uniform(3 * group) if sinks else None,
    )


def _attention(view, queries, kernel, sinks):
    """The kernel's call, its twin's result and the tolerance."""
    scale = queries.shape[-1] ** -0.5
    twin = exact(queries, view, scale, True, sinks)
    return lambda: kernel(queries, view, scale, True, sinks), twin, TOLERANCE[queries.dtype]


def _chunks():
    """Chunks of rows with windows before them, on slabs in another order."""
    chunks = chunks_with(*RAGGED)
    queries = queries_for(chunks, 2)
    given = queries, chunks, 0.2, True, uniform(4)
    return lambda: tiled_rows(*given), one_by_one(*given), TOLERANCE[mx.float32]


def _chunk_rows():
    windows, new = [uniform(3, 2, 5, 32) for _ in "kv"], [uniform(2, 2, 7, 32) for _ in "kv"]
    where = [(-3, 0), (-3, 1), (0, 0), (0, 1), (0, 2), (-2, 0), (1, 0), (1, 1), (1, 2), (1, 3)]
    index = host_rows(np.array(where, np.int32))
    twin = [
        mx.concatenate([old[2, :, :2], own[0, :, :3], old[1, :, :1], own[1, :, :4]], axis=1)[None]
        for old, own in zip(windows, new, strict=True)
    ]
    return lambda: list(chunk_rows(*new, windows, index, len(where))), twin, 0.0


def _candidates(learned=True):
    pool = pool_with([[5, 0, 21, 2], [0] * 4, [1, 0, 0, 0]], 32, 32, free=2)
    pool.retention = -mx.abs(pool.retention)
    column = np.array([[3, 1, 7], [5, -1, -1]], np.int32)
    numbers = np.array([(2, 40, 950, 7, 30, 9), (0, 600, 700, 1, 0, 100)], np.int32)
    given = pool, -mx.abs(uniform(4, 9)), column, numbers, learned
    return lambda: candidates_kernel(*given), candidates_reference(*given), 1e-5


def _selection():
    """Three rows of two groups of other budgets, ages and floors; ties of the first digits and of all."""
    rng, size = np.random.default_rng(1), (6, 300)
    score = mx.array((rng.integers(0, 30, size) / 64 - 0.2).astype(np.float32))
    position = np.stack([rng.permutation(300) for _ in range(6)]).astype(np.int32)
    head = rng.integers(0, 9, size) % 7
    arrays = score, mx.array(rng.random(size) < 0.1), mx.array(position), mx.array(head.astype(np.int32))
    wanted, seen = np.array([40, 50, 9, 150, 3, 100]), np.array([300, 300, 900, 900, 70_000, 70_000])
    lowest = np.array([-np.inf, -np.inf, -0.1, 0.1, -np.inf, 0.0])
    twin = mx.concatenate(
        [
            select_reference(
                *(a[g : g + 1] for a in arrays), int(wanted[g]), int(seen[g]), 6, float(lowest[g])
            )
            for g in range(6)
        ]
    )
    return lambda: score_select.select(*arrays, wanted, seen, 6, lowest), twin, 0.0


def _holes():
    # more that stay than holes
    keep = mx.random.bernoulli(0.95, (3, 3000))
    base = np.array([7000, 0, 14_000], np.int32)
    twin = destinations_reference(keep, base, 2500)
    return lambda: compaction_plan.destinations(keep, base, 2500), twin, 0.0


def _counts():
    owner = mx.random.randint(0, 6, (3, 9000)).astype(mx.int32)
    twin = mx.stack([mx.zeros((6,), mx.int32).at[row].add(1) for row in owner])
    return lambda: score_select.head_counts(owner, 5), twin, 0.0


def _drafts(size, bits=None):
    view = view_with([21, 0, 190], 7, size, size, bits=bits)
    return view, uniform(1, 6, 3, size) * 3, attend, None


def _chunk(size, bits, sinks=False):
    view = view_with([21, 0, 6], 13, size, size, bits=bits)
    return view, uniform(1, 6, 11, size) * 3, tiled, uniform(6) if sinks else None


# bytes: a simdgroup takes more entries of a piece than one step has, unless a call says otherwise
PIECE, PIECES = 40_000, {"pieces": 2048, "one piece": 10**9}
CALLS: dict[str, Callable] = {
    "rows": lambda: _rows(64, 2),
    "pieces": lambda: _rows(64, 2),
    "one piece": lambda: _rows(128, 8),
    "sinks": lambda: _rows(32, 2, sinks=True),
    "k8v4": lambda: _rows(64, 2, bits="k8v4"),
    "nibbles": lambda: _rows(96, 2, bits=4),
    "words": lambda: _rows(128, 2, bits=8),
    "half words": lambda: _rows(128, 8, mx.float16, bits="k8v4"),
    "large": lambda: _rows(128, 8),
    "drafts": lambda: _drafts(32),
    "chunk": lambda: _chunk(32, "k8v4"),
    "chunk of floats": lambda: _chunk(96, None, sinks=True),
}
# calls, what they should give, and how near
CALLS = {name: lambda made=made: _attention(*made()) for name, made in CALLS.items()}
CALLS |= {
    "chunks": _chunks,
    "chunk rows": _chunk_rows,
    "candidates": _candidates,
    "selection": _selection,
    "holes": _holes,
    "counts": _counts,
}


@dataclass(frozen=True)
class Mutant:
    """``old`` becomes ``new`` in a source, at its ``nth`` place; ``call`` notices in one of the passes."""

    file: str
    fault: str
    old: str
    new: str
    call: str
    found_by: str = "run"
    nth: int = 0

    def apply(self, source: str) -> str:
        parts = source.split(self.old)
        assert len(parts) > self.nth + 1, f"{self.file} does not contain {self.old!r}"
        return self.old.join(parts[: self.nth + 1]) + self.new + self.old.join(parts[self.nth + 1 :])

    def __str__(self) -> str:
        return f"{self.file}: {self.fault}"

    def noticed(self) -> bool:
        """Whether the call fails."""
        mx.random.seed(0)
        call, twin, tolerance = CALLS[self.call]()
        with self._planted():
            try:
                check(call, lambda: twin, tolerance, (self.found_by,))
            except KernelError:
                return True
        return False

    @contextmanager
    def _planted(self) -> Iterator[None]:
        stock, piece = launch._source, PIECES.get(self.call, PIECE)

        def source(file: str) -> str:
            text: str = stock(file)
            return self.apply(text) if file == f"{self.file}.metal" else text

        with (
            patch.object(launch, "_source", source),
            patch.multiple(decode_attention, PIECE_BYTES=piece, SMALL_PIECE=piece),
        ):
            yield


def _of(file: str, *rows: tuple) -> list[Mutant]:
    return [Mutant(file, *row) for row in rows]


MUTANTS = [
    *_of(
        "common",
        (
            "a word's codes begin with the highest",
            "word >> (k * BITS)",
            "word >> (32 - BITS - k * BITS)",
            "words",
        ),
        (
            "a lane reads its neighbour's word",
            "row[int(lane) * (WIDTH / 32) + w]",
            "row[int(lane) + 1]",
            "words",
        ),
        ("mask of one bit more", "MASK = (1u << BITS) - 1u", "MASK = (2u << BITS) - 1u", "words"),
        (
            "half words read as bytes",
            "(const device ushort*)row)[lane]",
            "(const device uchar*)row)[lane]",
            "k8v4",
        ),
        ("codes of a half word all alike", "word >> (i * BITS)", "word >> BITS", "k8v4"),
        ("bytes counted in nibbles", "[bit / 8]) >> (bit % 8)", "[bit / 4]) >> (bit % 8)", "nibbles"),
        ("nibbles of a byte exchanged", ">> (bit % 8) & MASK", ">> (4 - bit % 8) & MASK", "nibbles"),
        ("scale of the group before", "pairs[first / GROUP * 2])", "pairs[0])", "words"),
        (
            "bias and scale exchanged",
            "bias = float(pairs[first / GROUP * 2 + 1])",
            "bias = float(pairs[first / GROUP * 2])",
            "words",
        ),
        ("bias forgotten", "scale * out[i] + bias", "scale * out[i]", "k8v4"),
        (
            "groups of a lane taken as one",
            "const int group = (first + i) / GROUP * 2",
            "const int group = first / GROUP * 2",
            "nibbles",
        ),
        (
            "bias forgotten where lanes cross groups",
            " * out[i] + float(pairs[group + 1])",
            " * out[i]",
            "nibbles",
        ),
        (
            "scales expected one word on",
            "(row + D * BITS / 32)",
            "(row + D * BITS / 32 + 1)",
            "words",
        ),
        (
            "rows without their scales",
            "WORDS = D * BITS / 32 + D / GROUP * int(sizeof(T)) / 2;",
            "WORDS = D * BITS / 32;",
            "words",
        ),
        (
            "scales of another type's size",
            "D / GROUP * int(sizeof(T)) / 2;\n    load_packed",
            "D / GROUP * 2;\n    load_packed",
            "half words",
        ),
        ("wide loads of the first lane", "row[(int(lane) * E + i) / 4]", "row[i / 4]", "large"),
        ("a wide load's order", "out[i + k] = float(four[k])", "out[i + k] = float(four[3 - k])", "large"),
        (
            "slots of packed rows in elements",
            "(const device uint*)rows + slot * WORDS, lane",
            "(const device uint*)rows + slot * D, lane",
            "words",
            "asan",
        ),
        ("pieces without what is left over", " + min(piece, entries % pieces)", "", "pieces"),
        (
            "longer pieces come last",
            "min(piece, entries % pieces)",
            "max(0, piece - entries % pieces)",
            "pieces",
        ),
        ("piece of an entry off by one", "entry / (each + 1) :", "entry / (each + 1) + 1 :", "pieces"),
        (
            "shorter pieces counted from 0",
            "more + (entry - longer) / max(each, 1)",
            "(entry - longer) / max(each, 1)",
            "pieces",
        ),
        ("no maximum", "new_top = max(new_top, weight[j][p])", "new_top = top[j]", "rows"),
        ("sum not rescaled", "sum[j] *= old;", "", "rows"),
        ("results not rescaled", "out[j][i] *= old;", "", "rows"),
        (
            "entries past the end weigh",
            "const int seen = min(visible[j], end)",
            "const int seen = visible[j]",
            "rows",
        ),
        (
            "tokens to come are seen",
            "const int seen = min(visible[j], end)",
            "const int seen = end",
            "drafts",
        ),
        (
            "steps within a team not counted",
            "first + p * step < seen ? fast",
            "first + p < seen ? fast",
            "drafts",
        ),
        ("a sum of one entry a step", "sum[j] += weight[j][p];", "sum[j] += weight[j][0];", "rows"),
        ("base e", "? fast::exp2(weight[j][p] - new_top)", "? fast::exp(weight[j][p] - new_top)", "rows"),
        ("tile: codes not shifted", ">> (d * B % 32) & ((1u << B) - 1u)", "& ((1u << B) - 1u)", "chunk"),
        ("tile: the first group's scale", "float(pairs[d / GROUP * 2]) *", "float(pairs[1]) *", "chunk"),
        (
            "tile: bias forgotten",
            " * float(code) + float(pairs[d / GROUP * 2 + 1])",
            " * float(code)",
            "chunk",
        ),
        (
            "tile: rows without scales",
            "WORDS = D * B / 32 + D / GROUP * int(sizeof(T)) / 2",
            "WORDS = D * B / 32",
            "chunk",
        ),
    ),
    *_of(
        "decode_attention",
        ("the first row's slab for all", "slab = batch[row * 3]", "slab = batch[0]", "rows"),
        ("the first row's window for all", "window = batch[row * 3 + 1]", "window = batch[1]", "rows"),
        ("the first row's tokens for all", "recent = batch[row * 3 + 2]", "recent = batch[2]", "rows"),
        (
            "slabs one head too short",
            "slab * layer[1] + layer[0]",
            "slab * (layer[1] - 1) + layer[0]",
            "rows",
        ),
        ("the first row's queries for all", "queries + row * queries_strides[0]", "queries", "rows"),
        ("windows of one slab", "recent_keys + window * recent_keys_strides[0]", "recent_keys", "rows"),
        (
            "values of one slab's window",
            "recent_values + window * recent_values_strides[0]",
            "recent_values",
            "rows",
        ),
        (
            "partial results of one row",
            "(size_t(row) * (pieces + heads - 1) + piece + head)",
            "(size_t(0) * (pieces + heads - 1) + piece + head)",
            "rows",
        ),
        ("all simdgroups take the same rows", "row_group = int(warp) % RG", "row_group = 0", "large"),
        ("teams take the same entries", "team = int(warp) / RG", "team = 0", "large"),
        ("teams skip entries", "block += TEAMS * 32", "block += S * 32", "one piece"),
        ("slots of another team", "ahead = block + TEAMS * int(lane)", "ahead = block + int(lane)", "rows"),
        (
            "a slot for every step",
            "simd_shuffle(slots, ushort(turn + p))",
            "simd_shuffle(slots, ushort(turn))",
            "rows",
        ),
        (
            "values of another slot",
            "simd_shuffle(slots, ushort(turn + p))",
            "simd_shuffle(slots, ushort(turn))",
            "rows",
            "run",
            1,
        ),
        ("queries not scaled", "rows.query[j][i] *= scale", "rows.query[j][i] *= 1.0f", "rows"),
        ("logits of base e", "scaling[0] * LOG2E", "scaling[0]", "rows"),
        ("teams merged without their tops", "weight = fast::exp2(tg_top[s] - top)", "weight = 1.0f", "rows"),
        (
            "one team's sum",
            "for (int s = group; s < S; s += RG) {",
            "for (int s = group; s < RG; s += RG) {",
            "rows",
        ),
        (
            "no barrier before the merge",
            "threadgroup_barrier(mem_flags::mem_threadgroup);",
            "",
            "rows",
            "tsan",
        ),
        (
            "no barrier after the merge",
            "threadgroup_barrier(mem_flags::mem_threadgroup);",
            "",
            "rows",
            "tsan",
            1,
        ),
        ("window of bits", "KB, KG, T>(entry_row", "VB, VG, T>(entry_row", "k8v4"),
    ),
    *_of(
        "merge_partials",
        ("the first row's tokens", "recent = batch[row * 3 + 2]", "recent = batch[2]", "pieces"),
        ("the first row's slab", "first = batch[row * 3] *", "first = batch[0] *", "pieces"),
        (
            "another row's partial results",
            "size_t(row) * stats_shape[1]",
            "size_t(0) * stats_shape[1]",
            "rows",
        ),
        ("all rows to the first", "size_t(row) * threadgroups_per_grid.y + own", "size_t(own)", "rows"),
        ("sinks of base e", "sinks_strides[0]]) * LOG2E", "sinks_strides[0]])", "sinks"),
        ("base e", "old = fast::exp2(top - new_top)", "old = fast::exp(top - new_top)", "pieces"),
        ("the last piece left out", "piece <= last", "piece < last", "pieces"),
    ),
    *_of(
        "prefill_attention",
        ("keys by the values' bits", "copy_kept<D, KB, KG, T>", "copy_kept<D, VB, VG, T>", "chunk"),
        ("logits of base e", "scaling[0] * LOG2E", "scaling[0]", "chunk of floats"),
        ("sinks of base e", "sinks_strides[0]]) * LOG2E", "sinks_strides[0]])", "chunk of floats"),
        ("kept entries taken for new ones", "if (pooled) {", "if (pooled && entry > 0) {", "chunk"),
        ("the first row's slab for all", "flat = batch[at] *", "flat = batch[0] *", "chunks"),
        ("newest tokens of the first row", "start = batch[at + 1]", "start = batch[1]", "chunks"),
        ("as many newest tokens as the first row", "recent = batch[at + 2]", "recent = batch[2]", "chunks"),
        ("as many queries as the first row", "tokens = batch[at + 3]", "tokens = batch[3]", "chunks"),
        ("queries of the row's number", "query_row = batch[at + 4]", "query_row = at / 5", "chunks"),
        ("results of the first row", "(query_row * queries_shape[1] + query_head)", "query_head", "chunks"),
        ("rows of as many places as tokens", "* queries_shape[2] + token", "* tokens + token", "chunks"),
        (
            "values of the first row",
            "recent_values_strides[1] + start * recent_values_strides[2]",
            "recent_values_strides[1]",
            "chunks",
        ),
    ),
    *_of(
        "chunk_rows",
        ("windows' slabs off by one", "-1 - from", "-from", "chunk rows"),
        ("what is new taken from windows", "fresh = from >= 0", "fresh = from > 0", "chunk rows"),
        ("values of the next head", "h * values_strides[1]", "(1 - h) * values_strides[1]", "chunk rows"),
        ("windows' keys of the first token", "t * window_keys_strides[2]", "0", "chunk rows"),
        (
            "the last token left out",
            "if (token >= count) return;",
            "if (token + 1 >= count) return;",
            "chunk rows",
        ),
        ("tokens beyond the last", "if (token >= count) return;", "", "chunk rows", "asan"),
    ),
    *_of(
        "candidates",
        ("the first row's slab for all", "numbers[row * 6]) *", "numbers[0]) *", "candidates"),
        ("the first row's clock for all", "seen = numbers[row * 6 + 2]", "seen = numbers[2]", "candidates"),
        (
            "new tokens from the first row's place",
            "start = numbers[row * 6 + 1]",
            "start = numbers[1]",
            "candidates",
        ),
        ("the first row's look-ahead", "steps = numbers[row * 6 + 3]", "steps = numbers[3]", "candidates"),
        ("the first row's sinks", "sinks = numbers[row * 6 + 4]", "sinks = numbers[4]", "candidates"),
        ("the first row's window", "window = numbers[row * 6 + 5]", "window = numbers[5]", "candidates"),
        ("spill slots not counted", "(capacity + 1)", "capacity", "candidates"),
        ("padding taken for tokens", "if (from >= 0) {", "if (from >= -1) {", "candidates"),
        ("tokens before heads", "(i - capacity) / newcomers", "(i - capacity) % SIZE", "candidates"),
        ("all of one head", "size_t(flat) * newest_shape[1] + from", "size_t(from)", "candidates"),
        ("the window one shorter", "place >= seen - window", "place > seen - window", "candidates"),
        (
            "an age of one less",
            "utility(log_beta, seen - place, steps)",
            "utility(log_beta, seen - place - 1, steps)",
            "candidates",
        ),
    ),
    *_of(
        "scoring",
        ("no sum of later uses", "return result + precise::log", "return result; precise::log", "candidates"),
        ("sums of one step", "float(steps) * safe) / exp", "safe) / exp", "candidates"),
    ),
    *_of(
        "rank_histogram",
        ("no entry counts", "head[at] < heads ?", "head[at] <= heads ?", "selection"),
        ("prefixes of another group", "state[group * 3] >>", "state[0] >>", "selection"),
        ("one histogram for all", "(size_t(group) << BITS) + bin", "size_t(bin)", "selection"),
        (
            "no barrier before counting",
            "threadgroup_barrier(mem_flags::mem_threadgroup);",
            "",
            "selection",
            "tsan",
        ),
    ),
    *_of(
        "rank_digit",
        ("wanted of the first group", "state[group * 3 + 1])", "state[1])", "selection"),
        (
            "digits from below",
            "top - (self * E + i)];\nuint",
            "top + 1 - (1 << BITS) + (self * E + i)];\nuint",
            "selection",
        ),
        (
            "no barrier before the sums",
            "threadgroup_barrier(mem_flags::mem_threadgroup);",
            "",
            "selection",
            "tsan",
        ),
    ),
    *_of(
        "rank_verdict",
        ("one floor for all", "lowest[group]", "lowest[0]", "selection"),
        ("what must stay goes too", "rank >> 32 == 2 ||", "", "selection"),
    ),
    *_of(
        "tie_limit",
        ("the first row's clock", "seen = numbers[group * 3]", "seen = numbers[0]", "selection"),
        ("ranks of the first row's length", "numbers[group * 3 + 2] : -8", "numbers[2] : -8", "selection"),
        ("ties of the first group", "limit[group] =", "limit[0] =", "selection"),
    ),
    *_of(
        "keep_mask",
        ("the first group's limit", "<= limit[group]", "<= limit[0]", "selection"),
        ("the limit itself goes", "<= limit[group]", "< limit[group]", "selection"),
    ),
    *_of(
        "hole_filling",
        ("slots of the first group", "base[group] + slot", "base[0] + slot", "holes"),
        ("survivors that find no hole overwrite", "place++ < found[0]", "place++ <= found[0]", "holes"),
        ("holes are not seen by others", " | mem_flags::mem_device", "", "holes", "tsan"),
        ("newcomers of the first group", "size_t(group) * keep_shape[1] +", "", "holes"),
    ),
    *_of(
        "head_counts",
        ("owners of the first slab", "owner[row * owner_shape[1] + i]", "owner[i]", "counts"),
        ("counts of the first slab", "counts[row * BINS + bin]", "counts[bin]", "counts"),
    ),
]


def main() -> None:
    """Say of every mutant whether it was noticed; those with a word of ``argv`` in them, if there are any."""
    words, missed = sys.argv[1:], 0
    chosen = [m for m in MUTANTS if not words or any(word in str(m) for word in words)]
    for mutant in chosen:
        noticed = mutant.noticed()
        missed += not noticed
        print("noticed" if noticed else "MISSED ", mutant, flush=True)
    print(f"{len(chosen) - missed} of {len(chosen)} noticed")
    sys.exit(missed > 0)


if __name__ == "__main__":
    main()
