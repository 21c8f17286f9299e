// One threadgroup of S simdgroups per query row: the partial results of its head's pieces, joined by log-sum-exp.
constexpr int F = (V + 31) / 32;
const uint lane = thread_index_in_simdgroup;
const uint warp = simdgroup_index_in_threadgroup;
const uint self = thread_index_in_threadgroup;
const int row = int(threadgroup_position_in_grid.y), head = row / R;
const int heads = recent_keys_shape[1], recent = recent_keys_shape[2], first = layer[0];
const int pieces = stats_shape[0] - heads + 1;
const int origin = offsets[first];
const long entries = offsets[first + heads] - origin + long(heads) * recent;
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
  // with fewer entries than pieces some pieces are empty and wrote nothing
  if (piece_start(entries, piece, pieces) == piece_start(entries, piece + 1, pieces)) continue;
  const size_t part = size_t(piece + head) * R + row % R;
  const float new_top = max(top, stats[part * 2]);
  const float old = fast::exp(top - new_top), weight = fast::exp(stats[part * 2] - new_top);
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
const float sink = SINKS ? float(sinks[row / TOKENS * sinks_strides[0]]) : LOWEST;
top = sink;
for (int s = 0; s < S; s++) top = max(top, tg_top[s]);
sum = SINKS ? fast::exp(sink - top) : 0.0f;
for (int s = 0; s < S; s++) sum += tg_sum[s] * fast::exp(tg_top[s] - top);
for (int d = int(self); d < V; d += S * 32) {
  float joined = 0.0f;
  for (int s = 0; s < S; s++) joined += tg_out[s * V + d] * fast::exp(tg_top[s] - top);
  attended[size_t(row) * V + d] = T(joined / sum);
}
