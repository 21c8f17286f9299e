// out[r] = sum of x[r, :]; one threadgroup per row.
threadgroup float partial[32];
const uint row = threadgroup_position_in_grid.x;
const uint tid = thread_index_in_threadgroup;
const uint lane = thread_index_in_simdgroup;
const uint sg = simdgroup_index_in_threadgroup;
const uint n = uint(x_shape[1]);

float sum = 0.0f;
for (uint i = tid; i < n; i += threads_per_threadgroup.x) sum += float(x[row * n + i]);
sum = simd_sum(sum);
if (lane == 0) partial[sg] = sum;
threadgroup_barrier(mem_flags::mem_threadgroup);
if (sg == 0) {
  sum = lane < simdgroups_per_threadgroup ? partial[lane] : 0.0f;
  sum = simd_sum(sum);
  if (lane == 0) out[row] = sum;
}
