// keep[i] = 1 for the k largest scores; of equal ones the earlier stay. One threadgroup: a radix search of four
// passes for the k-th largest, then one pass in order that counts ties.
threadgroup atomic_uint histogram[256];
threadgroup uint found[2];  // the threshold's leading bits; how many entries are still wanted
threadgroup uint ties_of[32];
const uint tid = thread_index_in_threadgroup;
const uint width = threads_per_threadgroup.x;
const uint lane = thread_index_in_simdgroup;
const uint sg = simdgroup_index_in_threadgroup;
const uint n = uint(scores_shape[0]);
if (tid == 0) {
  found[0] = 0;
  found[1] = uint(k);
}
uint mask = 0;
for (int shift = 24; shift >= 0; shift -= 8) {
  for (uint b = tid; b < 256; b += width) atomic_store_explicit(&histogram[b], 0u, memory_order_relaxed);
  threadgroup_barrier(mem_flags::mem_threadgroup);
  const uint prefix = found[0];
  const uint wanted = found[1];
  for (uint i = tid; i < n; i += width) {
    const uint key = rank_of(scores[i]);
    if ((key & mask) == prefix)
      atomic_fetch_add_explicit(&histogram[(key >> uint(shift)) & 255u], 1u, memory_order_relaxed);
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  if (sg == 0) {  // a lane owns eight bins, the highest first
    uint own = 0;
    for (uint j = 0; j < 8; j++)
      own += atomic_load_explicit(&histogram[255u - (lane * 8 + j)], memory_order_relaxed);
    uint before = simd_prefix_exclusive_sum(own);
    if (before < wanted && wanted <= before + own) {
      for (uint j = 0; j < 8; j++) {
        const uint bin = 255u - (lane * 8 + j);
        const uint here = atomic_load_explicit(&histogram[bin], memory_order_relaxed);
        if (wanted <= before + here) {
          found[0] = prefix | (bin << uint(shift));
          found[1] = wanted - before;
          break;
        }
        before += here;
      }
    }
  }
  mask |= 255u << uint(shift);
  threadgroup_barrier(mem_flags::mem_threadgroup);
}
const uint threshold = found[0];
const uint allowed = found[1];
uint seen = 0;
for (uint start = 0; start < n; start += width) {
  const uint i = start + tid;
  const uint key = i < n ? rank_of(scores[i]) : 0u;
  const uint tie = i < n && key == threshold ? 1u : 0u;
  const uint earlier = simd_prefix_exclusive_sum(tie);
  const uint mine = simd_sum(tie);
  if (lane == 0) ties_of[sg] = mine;
  threadgroup_barrier(mem_flags::mem_threadgroup);
  const uint of_lane = lane < simdgroups_per_threadgroup ? ties_of[lane] : 0u;
  const uint before = simd_shuffle(simd_prefix_exclusive_sum(of_lane), ushort(sg));
  if (i < n) keep[i] = key > threshold || (tie && seen + before + earlier < allowed) ? 1 : 0;
  seen += simd_sum(of_lane);
  threadgroup_barrier(mem_flags::mem_threadgroup);
}
