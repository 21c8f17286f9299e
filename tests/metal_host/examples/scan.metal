// offsets[i] = lengths[0] + .. + lengths[i - 1], in 64 bits; one threadgroup, log-step scan in threadgroup memory.
threadgroup long sums[2][WIDTH];
const uint tid = thread_index_in_threadgroup;
const uint n = uint(lengths_shape[0]);
long base = 0;
for (uint start = 0; start < n; start += WIDTH) {
  const uint i = start + tid;
  sums[0][tid] = i < n ? long(lengths[i]) : 0;
  threadgroup_barrier(mem_flags::mem_threadgroup);
  uint from = 0;
  for (uint step = 1; step < WIDTH; step *= 2) {
    sums[1 - from][tid] = sums[from][tid] + (tid >= step ? sums[from][tid - step] : 0);
    from = 1 - from;
    threadgroup_barrier(mem_flags::mem_threadgroup);
  }
  if (i < n) offsets[i] = base + (tid > 0 ? sums[from][tid - 1] : 0);
  base += sums[from][WIDTH - 1];
  threadgroup_barrier(mem_flags::mem_threadgroup);
}
