// Entries of each head, and of none (the last bin).
const uint self = thread_index_in_threadgroup;
const int begin = int(threadgroup_position_in_grid.x) * BLOCK, end = min(begin + BLOCK, owner_shape[0]);
threadgroup atomic_int tg_counts[BINS];
for (uint bin = self; bin < uint(BINS); bin += S * 32) {
  atomic_store_explicit(&tg_counts[bin], 0, memory_order_relaxed);
}
threadgroup_barrier(mem_flags::mem_threadgroup);
for (int i = begin + int(self); i < end; i += S * 32) {
  atomic_fetch_add_explicit(&tg_counts[owner[i]], 1, memory_order_relaxed);
}
threadgroup_barrier(mem_flags::mem_threadgroup);
for (uint bin = self; bin < uint(BINS); bin += S * 32) {
  const int found = atomic_load_explicit(&tg_counts[bin], memory_order_relaxed);
  if (found > 0) atomic_fetch_add_explicit(&counts[bin], found, memory_order_relaxed);
}
