// Entries of each head of a slab, and of none (the last bin): grid (blocks, slabs).
const uint self = thread_index_in_threadgroup;
const size_t row = threadgroup_position_in_grid.y;
const int begin = int(threadgroup_position_in_grid.x) * BLOCK, end = min(begin + BLOCK, owner_shape[1]);
threadgroup atomic_int tg_counts[BINS];
for (uint bin = self; bin < uint(BINS); bin += S * 32) {
  atomic_store_explicit(&tg_counts[bin], 0, memory_order_relaxed);
}
threadgroup_barrier(mem_flags::mem_threadgroup);
for (int i = begin + int(self); i < end; i += S * 32) {
  atomic_fetch_add_explicit(&tg_counts[owner[row * owner_shape[1] + i]], 1, memory_order_relaxed);
}
threadgroup_barrier(mem_flags::mem_threadgroup);
for (uint bin = self; bin < uint(BINS); bin += S * 32) {
  const int found = atomic_load_explicit(&tg_counts[bin], memory_order_relaxed);
  if (found > 0) atomic_fetch_add_explicit(&counts[row * BINS + bin], found, memory_order_relaxed);
}
