// The fate of each candidate: 1 stays, 0 goes, 2 equals the last one that stays, so that its age and head decide.
// Those that need not stay go if their score is below `lowest`.
const int group = int(threadgroup_position_in_grid.y), count = score_shape[1], heads = numbers[group * 3 + 1];
const int begin = int(threadgroup_position_in_grid.x) * BLOCK, end = min(begin + BLOCK, count);
const ulong last = state[group * 3];
const uint floor_bits = ordered(lowest[group]);
for (int i = begin + int(thread_index_in_threadgroup); i < end; i += S * 32) {
  const size_t at = size_t(group) * count + i;
  uint8_t fate = 0;
  if (head[at] < heads) {
    const ulong rank = keeping_rank(score[at], must[at]);
    const bool high = rank >> 32 == 2 || uint(rank) >= floor_bits;
    fate = !high || rank < last ? 0 : rank == last ? 2 : 1;
  }
  verdict[at] = fate;
}
