// Attention of few query tokens over a layer's entries: grid (pieces, rows of the batch). A threadgroup takes one
// equal piece of its row's entries, whatever heads they belong to. A piece of a head gives one partial result, number
// piece + head, for merge_partials.
//
// The R query rows of a KV head are shared out over RG simdgroups, RB each. S / RG teams of them take turns with
// entries; the simdgroups of a team read the same ones at the same time.
constexpr int E = (D + 31) / 32, F = (V + 31) / 32, TEAMS = S / RG;
constexpr int P = RB <= 4 ? 4 : RB <= 8 ? 2 : 1;  // entries of a step, whose weights have to stay in registers too
const uint lane = thread_index_in_simdgroup;
const uint warp = simdgroup_index_in_threadgroup;
const uint self = thread_index_in_threadgroup;
const int row_group = int(warp) % RG, team = int(warp) / RG;
const int row = int(threadgroup_position_in_grid.y), heads = recent_keys_shape[1];
// of the row: its slab, its place among the windows, and the tokens there
const int slab = batch[row * 3], window = batch[row * 3 + 1], recent = batch[row * 3 + 2];
const int first = slab * layer[1] + layer[0];
const int origin = offsets[first];
const int entries = offsets[first + heads] - origin + heads * recent;
const int piece = int(threadgroup_position_in_grid.x), pieces = int(threadgroups_per_grid.x);
const int piece_begin = piece_start(entries, piece, pieces), piece_end = piece_start(entries, piece + 1, pieces);
const long key_step = recent_keys_strides[3], value_step = recent_values_strides[3];
const float scale = scaling[0] * LOG2E;

threadgroup float tg_top[S];
threadgroup float tg_sum[S];
threadgroup float tg_out[TEAMS > 1 ? S * V : 1];
thread Rows<RB, P, E, F> rows;
thread float entry_row[E > F ? E : F];

for (int head = 0; head < heads; head++) {
  const int begin = offsets[first + head], kept = offsets[first + head + 1] - begin;
  const int base = begin - origin + head * recent;
  const int low = max(piece_begin - base, 0), high = min(piece_end - base, kept + recent);
  if (low >= high) continue;  // the same for all threads

  const device T* head_keys = recent_keys + window * recent_keys_strides[0] + head * recent_keys_strides[1];
  const device T* head_values =
      recent_values + window * recent_values_strides[0] + head * recent_values_strides[1];
  rows.start();
  UNROLL for (int j = 0; j < RB; j++) {
    const int own = row_group * RB + j;
    rows.visible[j] = CAUSAL ? kept + recent - TOKENS + 1 + own % TOKENS : kept + recent;
    if (own < R) {
      const size_t query_head = head * (R / TOKENS) + own / TOKENS;
      const device T* query = queries + row * queries_strides[0] + query_head * queries_strides[1] +
                              own % TOKENS * queries_strides[2];
      load_row<D, E>(rows.query[j], query, lane, queries_strides[3]);
      UNROLL for (int i = 0; i < E; i++) rows.query[j][i] *= scale;
    } else {
      UNROLL for (int i = 0; i < E; i++) rows.query[j][i] = 0.0f;
    }
  }

  for (int block = low + team; block < high; block += TEAMS * 32) {
    const int ahead = block + TEAMS * int(lane);  // the entry that is taken in `lane` turns
    const int slots = ahead < min(high, kept) ? table[begin + ahead] : 0;
    for (int turn = 0; turn < 32 && block + TEAMS * turn < high; turn += P) {
      UNROLL for (int p = 0; p < P; p++) {
        const int entry = block + TEAMS * (turn + p);
        const size_t slot = simd_shuffle(slots, ushort(turn + p));
        if (entry < min(high, kept)) {
          load_kept<D, E, KB, KG, T>(entry_row, (const device T*)keys, slot, lane);
          rows.look(entry_row, p);
        } else if (entry < high) {
          load_row<D, E>(entry_row, head_keys + (entry - kept) * recent_keys_strides[2], lane, key_step);
          rows.look(entry_row, p);
        }
      }
      rows.weigh(block + TEAMS * turn, TEAMS, high);
      UNROLL for (int p = 0; p < P; p++) {
        const int entry = block + TEAMS * (turn + p);
        const size_t slot = simd_shuffle(slots, ushort(turn + p));
        if (entry < min(high, kept)) {
          load_kept<V, F, VB, VG, T>(entry_row, (const device T*)values, slot, lane);
          rows.take(entry_row, p);
        } else if (entry < high) {
          load_row<V, F>(entry_row, head_values + (entry - kept) * recent_values_strides[2], lane, value_step);
          rows.take(entry_row, p);
        }
      }
    }
  }

  const size_t part = (size_t(row) * (pieces + heads - 1) + piece + head) * R;
  if (TEAMS == 1) {
    UNROLL for (int j = 0; j < RB; j++) {
      const int own = row_group * RB + j;
      if (own >= R) continue;
      UNROLL for (int i = 0; i < F; i++) {
        if (int(lane) * F + i < V) partial[(part + own) * V + lane * F + i] = rows.out[j][i];
      }
      if (lane == 0) {
        stats[(part + own) * 2] = rows.top[j];
        stats[(part + own) * 2 + 1] = rows.sum[j];
      }
    }
    continue;
  }
  UNROLL for (int j = 0; j < RB; j++) {
    if (lane == 0) {
      tg_top[warp] = rows.top[j];
      tg_sum[warp] = rows.sum[j];
    }
    UNROLL for (int i = 0; i < F; i++) {
      if (int(lane) * F + i < V) tg_out[warp * V + lane * F + i] = rows.out[j][i];
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (int at = int(self); at < RG * V; at += S * 32) {
      const int group = at / V, d = at % V, own = group * RB + j;
      if (own >= R) continue;
      float top = LOWEST, sum = 0.0f, out = 0.0f;
      for (int s = group; s < S; s += RG) top = max(top, tg_top[s]);
      for (int s = group; s < S; s += RG) {
        const float weight = fast::exp2(tg_top[s] - top);
        sum += tg_sum[s] * weight;
        out += tg_out[s * V + d] * weight;
      }
      partial[(part + own) * V + d] = out;
      if (d == 0) {
        stats[(part + own) * 2] = top;
        stats[(part + own) * 2 + 1] = sum;
      }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
  }
}
