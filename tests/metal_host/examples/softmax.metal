// Row-wise softmax in T; one threadgroup per row, `shared_value` used for the maximum and again for the sum.
threadgroup float shared_value[32];
const uint row = threadgroup_position_in_grid.x;
const uint tid = thread_index_in_threadgroup;
const uint lane = thread_index_in_simdgroup;
const uint sg = simdgroup_index_in_threadgroup;
const uint n = uint(x_shape[1]);
const uint start = row * n;

float highest = -INFINITY;
for (uint i = tid; i < n; i += threads_per_threadgroup.x) highest = max(highest, float(x[start + i]));
highest = simd_max(highest);
if (lane == 0) shared_value[sg] = highest;
threadgroup_barrier(mem_flags::mem_threadgroup);
highest = simd_max(lane < simdgroups_per_threadgroup ? shared_value[lane] : -INFINITY);
threadgroup_barrier(mem_flags::mem_threadgroup);

float sum = 0.0f;
for (uint i = tid; i < n; i += threads_per_threadgroup.x) sum += fast::exp(float(x[start + i]) - highest);
sum = simd_sum(sum);
if (lane == 0) shared_value[sg] = sum;
threadgroup_barrier(mem_flags::mem_threadgroup);
sum = simd_sum(lane < simdgroups_per_threadgroup ? shared_value[lane] : 0.0f);
for (uint i = tid; i < n; i += threads_per_threadgroup.x)
  out[start + i] = T(fast::exp(float(x[start + i]) - highest) / sum);
