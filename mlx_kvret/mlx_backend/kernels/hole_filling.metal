// The n-th newcomer of a group that stays fills the group's n-th hole; what stays not, or finds none, is spilled.
// keep: a group's C slots, then its newcomers. base: the first slot of each group.
// One threadgroup per group takes the slots, then the newcomers, in blocks of E per thread.
constexpr int E = 8;
const uint self = thread_index_in_threadgroup;
const uint lane = thread_index_in_simdgroup;
const uint warp = simdgroup_index_in_threadgroup;
const int group = int(threadgroup_position_in_grid.x);
const int count = room[0], newcomers = keep_shape[1] - count;

threadgroup int tg_counts[S];
int found[2] = {0, 0};  // holes, those that stay
for (int phase = 0; phase < 2; phase++) {
  const int length = phase == 0 ? count : newcomers;
  const size_t row = size_t(group) * keep_shape[1] + (phase == 0 ? 0 : count);
  for (int block = 0; block < length; block += S * 32 * E) {
    const int begin = block + int(self) * E, end = min(begin + E, length);
    int mine = 0;
    for (int i = begin; i < end; i++) mine += phase == 0 ? !keep[row + i] : int(keep[row + i]);
    int place = simd_prefix_exclusive_sum(mine);
    if (lane == 31) tg_counts[warp] = place + mine;
    threadgroup_barrier(mem_flags::mem_threadgroup);
    int all = 0;
    for (uint s = 0; s < uint(S); s++) {
      if (s < warp) place += tg_counts[s];
      all += tg_counts[s];
    }
    place += found[phase];
    for (int i = begin; i < end; i++) {
      if (phase == 0) {
        if (!keep[row + i]) holes[size_t(group) * count + place++] = i;
      } else {
        int slot = count;
        if (keep[row + i] && place++ < found[0]) slot = holes[size_t(group) * count + place - 1];
        slots[size_t(group) * newcomers + i] = base[group] + slot;
      }
    }
    found[phase] += all;
    threadgroup_barrier(mem_flags::mem_threadgroup | mem_flags::mem_device);
  }
}
