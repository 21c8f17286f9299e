// One query token over ragged keys and values: head h of KV holds rows offsets[h] .. offsets[h + 1] - 1.
// One threadgroup of SG simdgroups per query head; each simdgroup takes every SG-th row, merged by log-sum-exp.
constexpr int E = D / 32;
const uint head = threadgroup_position_in_grid.x;
const uint lane = thread_index_in_simdgroup;
const uint sg = simdgroup_index_in_threadgroup;
const int begin = offsets[head / G];
const int end = offsets[head / G + 1];
threadgroup float highest_of[SG];
threadgroup float sum_of[SG];
threadgroup float values_of[SG][D];

float query[E], acc[E];
for (int i = 0; i < E; i++) {
  query[i] = float(q[head * D + lane * E + i]) * scale;
  acc[i] = 0.0f;
}
float highest = -INFINITY;
float sum = 0.0f;
for (int t = begin + int(sg); t < end; t += SG) {
  const device half* key = keys + size_t(t) * D + lane * E;
  const device half* value = values + size_t(t) * D + lane * E;
  float logit = 0.0f;
  for (int i = 0; i < E; i++) logit += query[i] * float(key[i]);
  logit = simd_sum(logit);
  const float now = max(highest, logit);
  const float fade = fast::exp(highest - now);
  const float weight = fast::exp(logit - now);
  sum = sum * fade + weight;
  for (int i = 0; i < E; i++) acc[i] = acc[i] * fade + weight * float(value[i]);
  highest = now;
}
if (lane == 0) {
  highest_of[sg] = highest;
  sum_of[sg] = sum;
}
for (int i = 0; i < E; i++) values_of[sg][lane * E + i] = acc[i];
threadgroup_barrier(mem_flags::mem_threadgroup);

const float top = simd_max(lane < uint(SG) ? highest_of[lane] : -INFINITY);
const float share = lane < uint(SG) && highest_of[lane] > -INFINITY ? fast::exp(highest_of[lane] - top) : 0.0f;
const float total = simd_sum(lane < uint(SG) ? share * sum_of[lane] : 0.0f);
for (uint d = sg * 32 + lane; d < uint(D); d += SG * 32) {
  float merged = 0.0f;
  for (int j = 0; j < SG; j++)
    if (highest_of[j] > -INFINITY) merged += values_of[j][d] * fast::exp(highest_of[j] - top);
  out[head * D + d] = half(total > 0.0f ? merged / total : 0.0f);
}
