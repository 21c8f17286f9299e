// counts[b] = how many of x lie in bin b, by way of a threadgroup's own histogram; outputs start at 0.
threadgroup atomic_uint own[BINS];
const uint tid = thread_index_in_threadgroup;
for (uint b = tid; b < BINS; b += threads_per_threadgroup.x) atomic_store_explicit(&own[b], 0u, memory_order_relaxed);
threadgroup_barrier(mem_flags::mem_threadgroup);
const uint i = thread_position_in_grid.x;
const uint bin = min(uint(x[i] * float(BINS)), uint(BINS - 1));
atomic_fetch_add_explicit(&own[bin], 1u, memory_order_relaxed);
threadgroup_barrier(mem_flags::mem_threadgroup);
for (uint b = tid; b < BINS; b += threads_per_threadgroup.x) {
  const uint mine = atomic_load_explicit(&own[b], memory_order_relaxed);
  if (mine) atomic_fetch_add_explicit(&counts[b], mine, memory_order_relaxed);
}
