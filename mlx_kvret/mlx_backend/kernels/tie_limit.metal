// The largest tie rank that stays, by radix selection of the wanted-th smallest; nothing to do where all equals stay.
// One threadgroup per group. Of each numbers: seen, heads, shift of the highest byte of a tie rank.
const uint self = thread_index_in_threadgroup;
const uint lane = thread_index_in_simdgroup;
const int group = int(threadgroup_position_in_grid.x), count = verdict_shape[1];
const int seen = numbers[group * 3], heads = numbers[group * 3 + 1];
const bool open = state[group * 3 + 1] < state[group * 3 + 2];

threadgroup atomic_uint tg_counts[256];
threadgroup ulong tg_prefix[1];
threadgroup uint tg_wanted[1];
if (self == 0) {
  tg_prefix[0] = 0;
  tg_wanted[0] = uint(state[group * 3 + 1]);
}
for (int shift = open ? numbers[group * 3 + 2] : -8; shift >= 0; shift -= 8) {
  for (uint bin = self; bin < 256; bin += S * 32) atomic_store_explicit(&tg_counts[bin], 0u, memory_order_relaxed);
  threadgroup_barrier(mem_flags::mem_threadgroup);
  const ulong prefix = tg_prefix[0];
  const uint wanted = tg_wanted[0];
  for (int i = int(self); i < count; i += S * 32) {
    const size_t at = size_t(group) * count + i;
    if (verdict[at] != 2) continue;
    const ulong rank = tie_rank(position[at], head[at], seen, heads);
    if (rank >> shift >> 8 == prefix >> shift >> 8) {
      atomic_fetch_add_explicit(&tg_counts[uint(rank >> shift) & 255u], 1u, memory_order_relaxed);
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  if (simdgroup_index_in_threadgroup == 0) {
    uint mine = 0;
    for (uint i = 0; i < 8; i++) mine += atomic_load_explicit(&tg_counts[lane * 8 + i], memory_order_relaxed);
    uint below = simd_prefix_exclusive_sum(mine);
    if (below < wanted && wanted <= below + mine) {
      for (uint i = 0; i < 8; i++) {
        const uint found = atomic_load_explicit(&tg_counts[lane * 8 + i], memory_order_relaxed);
        if (wanted <= below + found) {
          tg_prefix[0] = prefix | ulong(lane * 8 + i) << shift;
          tg_wanted[0] = wanted - below;
          break;
        }
        below += found;
      }
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
}
if (self == 0) limit[group] = open ? tg_prefix[0] : ~ulong(0);
