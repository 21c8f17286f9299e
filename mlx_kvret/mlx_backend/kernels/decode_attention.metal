// Attention of few query tokens over a layer's entries, one threadgroup per equal piece of them, whatever heads they
// belong to. Each key and value is read once for all R query rows of its head. A piece of a head gives one partial
// result, number piece + head, for merge_partials.
//
// RB rows per simdgroup: all of them (RG = 1, the S simdgroups take turns with entries), or the rows are shared out
// over RG = S simdgroups, and tiles of N entries pass through threadgroup memory.
constexpr int E = (D + 31) / 32, F = (V + 31) / 32;
const uint lane = thread_index_in_simdgroup;
const uint warp = simdgroup_index_in_threadgroup;
const uint self = thread_index_in_threadgroup;
const int heads = recent_keys_shape[1], recent = recent_keys_shape[2];
const long key_step = recent_keys_strides[3], value_step = recent_values_strides[3];
const int first = layer[0];
const int origin = offsets[first];
const long entries = offsets[first + heads] - origin + long(heads) * recent;
const int piece = int(threadgroup_position_in_grid.x), pieces = int(threadgroups_per_grid.x);
const int piece_begin = piece_start(entries, piece, pieces), piece_end = piece_start(entries, piece + 1, pieces);
const float scale = scaling[0];

threadgroup float tg_top[S];
threadgroup float tg_sum[S];
threadgroup float tg_out[RG > 1 ? 1 : S * V];
threadgroup T tg_keys[RG > 1 ? N * D : 1];
threadgroup T tg_values[RG > 1 ? N * V : 1];
thread Rows<RB, E, F> rows;
thread float key[E];
thread float value[F];

for (int head = 0; head < heads; head++) {
  const int begin = offsets[first + head], kept = offsets[first + head + 1] - begin;
  const int base = begin - origin + head * recent;
  const int low = max(piece_begin - base, 0), high = min(piece_end - base, kept + recent);
  if (low >= high) continue;  // the same for all threads

  const device T* head_keys = recent_keys + head * recent_keys_strides[1];
  const device T* head_values = recent_values + head * recent_values_strides[1];
  rows.start();
  UNROLL for (int j = 0; j < RB; j++) {
    const int row = (RG > 1 ? int(warp) : 0) * RB + j;
    rows.visible[j] = CAUSAL ? kept + recent - TOKENS + 1 + row % TOKENS : kept + recent;
    if (row < R) {
      const size_t query_head = head * (R / TOKENS) + row / TOKENS;
      const device T* query = queries + query_head * queries_strides[1] + row % TOKENS * queries_strides[2];
      load_row<D, E>(rows.query[j], query, lane, queries_strides[3]);
      UNROLL for (int i = 0; i < E; i++) rows.query[j][i] *= scale;
    } else {
      UNROLL for (int i = 0; i < E; i++) rows.query[j][i] = 0.0f;
    }
  }

  if (RG == 1) {
    for (int block = low + int(warp); block < high; block += S * 32) {
      const int ahead = block + S * int(lane);  // the entry this simdgroup takes in `lane` steps
      const int slots = ahead < min(high, kept) ? table[begin + ahead] : 0;
      for (int j = 0; j < 32 && block + S * j < high; j++) {
        const int entry = block + S * j;
        const size_t slot = simd_shuffle(slots, ushort(j));
        if (entry < kept) {
          load_row<D, E>(key, keys + slot * D, lane, 1);
          load_row<V, F>(value, values + slot * V, lane, 1);
        } else {
          load_row<D, E>(key, head_keys + (entry - kept) * recent_keys_strides[2], lane, key_step);
          load_row<V, F>(value, head_values + (entry - kept) * recent_values_strides[2], lane, value_step);
        }
        rows.take(key, value, entry);
      }
    }
  } else {
    for (int tile = low; tile < high; tile += N) {
      const int count = min(N, high - tile);
      for (int j = int(warp); j < count; j += S) {
        const int entry = tile + j;
        const bool pooled = entry < kept;
        const size_t slot = pooled ? table[begin + entry] : 0;
        const device T* k = pooled ? keys + slot * D : head_keys + (entry - kept) * recent_keys_strides[2];
        const device T* v = pooled ? values + slot * V : head_values + (entry - kept) * recent_values_strides[2];
        copy_row<D>(tg_keys + j * D, k, lane, pooled ? 1 : key_step, true);
        copy_row<V>(tg_values + j * V, v, lane, pooled ? 1 : value_step, true);
      }
      threadgroup_barrier(mem_flags::mem_threadgroup);
      for (int j = 0; j < count; j++) {
        load_row<D, E>(key, tg_keys + j * D, lane, 1);
        load_row<V, F>(value, tg_values + j * V, lane, 1);
        rows.take(key, value, tile + j);
      }
      threadgroup_barrier(mem_flags::mem_threadgroup);
    }
  }

  const size_t part = size_t(piece + head) * R;
  if (RG == 1) {
    UNROLL for (int j = 0; j < RB; j++) {
      if (lane == 0) {
        tg_top[warp] = rows.top[j];
        tg_sum[warp] = rows.sum[j];
      }
      UNROLL for (int i = 0; i < F; i++) {
        if (int(lane) * F + i < V) tg_out[warp * V + lane * F + i] = rows.out[j][i];
      }
      threadgroup_barrier(mem_flags::mem_threadgroup);
      float top = LOWEST, sum = 0.0f;
      for (int s = 0; s < S; s++) top = max(top, tg_top[s]);
      for (int s = 0; s < S; s++) sum += tg_sum[s] * fast::exp(tg_top[s] - top);
      for (int d = int(self); d < V; d += S * 32) {
        float out = 0.0f;
        for (int s = 0; s < S; s++) out += tg_out[s * V + d] * fast::exp(tg_top[s] - top);
        partial[(part + j) * V + d] = out;
      }
      if (self == 0) {
        stats[(part + j) * 2] = top;
        stats[(part + j) * 2 + 1] = sum;
      }
      threadgroup_barrier(mem_flags::mem_threadgroup);
    }
  } else {
    UNROLL for (int j = 0; j < RB; j++) {
      const int row = int(warp) * RB + j;
      if (row >= R) continue;
      UNROLL for (int i = 0; i < F; i++) {
        if (int(lane) * F + i < V) partial[(part + row) * V + lane * F + i] = rows.out[j][i];
      }
      if (lane == 0) {
        stats[(part + row) * 2] = rows.top[j];
        stats[(part + row) * 2 + 1] = rows.sum[j];
      }
    }
  }
}
