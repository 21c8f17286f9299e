// Verdicts to a mask: of those that equal the last one to stay, the ones up to the tie limit.
const int group = int(threadgroup_position_in_grid.y), count = verdict_shape[1];
const int begin = int(threadgroup_position_in_grid.x) * BLOCK, end = min(begin + BLOCK, count);
const int seen = numbers[group * 3], heads = numbers[group * 3 + 1];
for (int i = begin + int(thread_index_in_threadgroup); i < end; i += S * 32) {
  const size_t at = size_t(group) * count + i;
  bool stays = verdict[at] == 1;
  if (verdict[at] == 2) stays = tie_rank(position[at], head[at], seen, heads) <= limit[group];
  keep[at] = stays;
}
