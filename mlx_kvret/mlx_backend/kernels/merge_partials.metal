// One threadgroup of S simdgroups per query row and row of the batch: the partial results of its head's pieces, joined
// by log-sum-exp. Logits are of base 2.
constexpr int F = (V + 31) / 32;
const uint lane = thread_index_in_simdgroup;
const uint warp = simdgroup_index_in_threadgroup;
const uint self = thread_index_in_threadgroup;
const int own = int(threadgroup_position_in_grid.y), head = own / R, row = int(threadgroup_position_in_grid.z);
const int heads = int(threadgroups_per_grid.y) / R, recent = batch[row * 3 + 2];
const int first = batch[row * 3] * layer[1] + layer[0];
const int pieces = stats_shape[1] - heads + 1;
const int origin = offsets[first];
const int entries = offsets[first + heads] - origin + heads * recent;
const int begin = offsets[first + head] - origin + head * recent;
const int end = offsets[first + head + 1] - origin + (head + 1) * recent;
const int last = piece_of(entries, end - 1, pieces);

threadgroup float tg_top[S];
threadgroup float tg_sum[S];
threadgroup float tg_out[S * V];
thread float out[F];
float top = LOWEST, sum = 0.0f;
UNROLL for (int i = 0; i < F; i++) out[i] = 0.0f;

for (int piece = piece_of(entries, begin, pieces) + int(warp); piece <= last; piece += S) {
  const size_t part = (size_t(row) * stats_shape[1] + piece + head) * R + own % R;
  const float new_top = max(top, stats[part * 2]);
  const float old = fast::exp2(top - new_top), weight = fast::exp2(stats[part * 2] - new_top);
  sum = sum * old + stats[part * 2 + 1] * weight;
  UNROLL for (int i = 0; i < F; i++) {
    const int d = int(lane) * F + i;
    out[i] = out[i] * old + (d < V ? partial[part * V + d] * weight : 0.0f);
  }
  top = new_top;
}

if (lane == 0) {
  tg_top[warp] = top;
  tg_sum[warp] = sum;
}
UNROLL for (int i = 0; i < F; i++) {
  if (int(lane) * F + i < V) tg_out[warp * V + lane * F + i] = out[i];
}
threadgroup_barrier(mem_flags::mem_threadgroup);

// a sink is the logit of an entry without a value
const float sink = SINKS ? float(sinks[own / TOKENS * sinks_strides[0]]) * LOG2E : LOWEST;
top = sink;
for (int s = 0; s < S; s++) top = max(top, tg_top[s]);
sum = SINKS ? fast::exp2(sink - top) : 0.0f;
for (int s = 0; s < S; s++) sum += tg_sum[s] * fast::exp2(tg_top[s] - top);
const size_t place = size_t(row) * threadgroups_per_grid.y + own;
for (int d = int(self); d < V; d += S * 32) {
  float joined = 0.0f;
  for (int s = 0; s < S; s++) joined += tg_out[s * V + d] * fast::exp2(tg_top[s] - top);
  attended[place * V + d] = T(joined / sum);
}
