// What competes in a compaction: of each group of every row that is due its C slots, and then its newcomers, head by
// head. One group of a row is a row of the grid. Where a row has fewer newcomers than others, what is left over has the
// head of none.
// numbers, of each row: slab, first new position, seen, look-ahead, sinks, window.
const int group = int(threadgroup_position_in_grid.y), row = group / GROUPS, own = group % GROUPS;
const int capacity = room[0], newcomers = column_shape[1], heads = GROUPS * SIZE;
const int count = capacity + SIZE * newcomers;
const int begin = int(threadgroup_position_in_grid.x) * BLOCK, end = min(begin + BLOCK, count);
const int start = numbers[row * 6 + 1], seen = numbers[row * 6 + 2], steps = numbers[row * 6 + 3];
const int sinks = numbers[row * 6 + 4], window = numbers[row * 6 + 5];
const size_t first = (size_t(numbers[row * 6]) * GROUPS + own) * (capacity + 1);
for (int i = begin + int(thread_index_in_threadgroup); i < end; i += S * 32) {
  const size_t at = size_t(group) * count + i;
  float log_beta = 0.0f;
  int place = 0, which = heads;
  if (i < capacity) {
    log_beta = pool_retention[first + i];
    place = pool_position[first + i];
    which = pool_owner[first + i];
  } else {
    const int token = (i - capacity) % newcomers, flat = own * SIZE + (i - capacity) / newcomers;
    const int from = column[size_t(row) * newcomers + token];
    if (from >= 0) {
      log_beta = newest[size_t(flat) * newest_shape[1] + from];
      place = start + token;
      which = flat;
    }
  }
  retention[at] = log_beta;
  position[at] = place;
  head[at] = which;
  must[at] = place < sinks || place >= seen - window;
  score[at] = LEARNED ? utility(log_beta, seen - place, steps) : log_beta;
}
