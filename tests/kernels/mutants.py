"""Faults planted in the attention kernels: one textual change each, and the call that must notice it.

``PYTHONPATH=tests python -m tests.kernels.mutants`` tries all of them; the tests try some.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from unittest.mock import patch

import mlx.core as mx
from metal_host import KernelError, check

from mlx_kvret.mlx_backend.kernels import decode_attention, launch
from mlx_kvret.mlx_backend.kernels.attention import attend
from mlx_kvret.mlx_backend.kernels.prefill_attention import tiled

from .cases import batch_with, uniform, view_with
from .test_attention import TOLERANCE, exact


def _rows(size, group, dtype=mx.float32, bits=None, sinks=False):
    """Two rows of a batch, ragged, one of them with an empty head."""
    view = batch_with([[590, 0, 9], [1, 320, 3]], [3, 5], size, dtype, bits)
    return (
        view,
        uniform(2, 3 * group, 1, size, dtype=dtype) * 3,
        attend,
        uniform(3 * group) if sinks else None,
    )


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
        view, queries, kernel, sinks = CALLS[self.call]()
        scale = queries.shape[-1] ** -0.5
        twin = exact(queries, view, scale, True, sinks)
        with self._planted():
            try:
                check(
                    lambda: kernel(queries, view, scale, True, sinks),
                    lambda: twin,
                    TOLERANCE[queries.dtype],
                    (self.found_by,),
                )
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
