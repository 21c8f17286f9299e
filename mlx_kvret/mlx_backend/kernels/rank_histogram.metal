// How many candidates of a group have each value of the next digit, among those that share the prefix so far.
// Of each group numbers: seen, heads; state: prefix, wanted, equal.
const uint self = thread_index_in_threadgroup;
const int group = int(threadgroup_position_in_grid.y), count = score_shape[1], heads = numbers[group * 3 + 1];
const int begin = int(threadgroup_position_in_grid.x) * BLOCK, end = min(begin + BLOCK, count);
const ulong prefix = state[group * 3] >> (SHIFT + BITS);

threadgroup atomic_uint tg_counts[1 << BITS];
for (uint bin = self; bin < 1u << BITS; bin += S * 32) {
  atomic_store_explicit(&tg_counts[bin], 0u, memory_order_relaxed);
}
threadgroup_barrier(mem_flags::mem_threadgroup);
for (int i = begin + int(self); i < end; i += S * 32) {
  const size_t at = size_t(group) * count + i;
  const ulong rank = head[at] < heads ? keeping_rank(score[at], must[at]) : 0;
  if (rank >> (SHIFT + BITS) == prefix) {
    const uint bin = uint(rank >> SHIFT) & ((1u << BITS) - 1);
    atomic_fetch_add_explicit(&tg_counts[bin], 1u, memory_order_relaxed);
  }
}
threadgroup_barrier(mem_flags::mem_threadgroup);
for (uint bin = self; bin < 1u << BITS; bin += S * 32) {
  const uint found = atomic_load_explicit(&tg_counts[bin], memory_order_relaxed);
  if (found > 0) atomic_fetch_add_explicit(&histogram[(size_t(group) << BITS) + bin], found, memory_order_relaxed);
}
