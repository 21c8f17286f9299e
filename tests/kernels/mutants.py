"""Faults planted in the kernels: one textual change each, and the call that must notice it.

``PYTHONPATH=tests python -m tests.kernels.mutants`` tries all of them; the tests try some.
"""

import sys

from .planting import Mutant


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
