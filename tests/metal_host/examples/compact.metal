// Rows whose flag is set, in order, and their indices; one threadgroup.
threadgroup uint kept_of[32];
const uint tid = thread_index_in_threadgroup;
const uint width = threads_per_threadgroup.x;
const uint lane = thread_index_in_simdgroup;
const uint sg = simdgroup_index_in_threadgroup;
const uint n = uint(flags_shape[0]);
uint base = 0;
for (uint start = 0; start < n; start += width) {
  const uint row = start + tid;
  const uint stays = row < n && flags[row] != 0 ? 1u : 0u;
  const uint within = simd_prefix_exclusive_sum(stays);
  const uint mine = simd_sum(stays);
  if (lane == 0) kept_of[sg] = mine;
  threadgroup_barrier(mem_flags::mem_threadgroup);
  const uint of_lane = lane < simdgroups_per_threadgroup ? kept_of[lane] : 0u;
  const uint before = simd_shuffle(simd_prefix_exclusive_sum(of_lane), ushort(sg));
  if (stays) {
    const uint to = base + before + within;
    for (int c = 0; c < W / 4; c++)
      ((device half4*)out)[to * (W / 4) + c] = ((const device half4*)rows)[row * (W / 4) + c];
    index[to] = int(row);
  }
  base += simd_sum(of_lane);
  threadgroup_barrier(mem_flags::mem_threadgroup);
}
if (tid == 0) count[0] = int(base);
