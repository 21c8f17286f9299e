// Attention of chunks of queries over their heads' kept entries and newest tokens (FlashAttention, arXiv 2205.14135):
// grid (blocks of query rows, KV heads, rows of the batch). A threadgroup has S * 8 query rows of one KV head, its G query heads side by side; tiles of N entries pass through
// threadgroup memory, once for all rows. Products are of 8x8 blocks; a lane holds two neighbours of one row of each.
constexpr int E = D / 8, F = V / 8, C = N / 8, PAD = 16 / sizeof(T);
const uint lane = thread_index_in_simdgroup;
const uint warp = simdgroup_index_in_threadgroup;
const int head = int(threadgroup_position_in_grid.y), heads = recent_keys_shape[1];
// of a row: its slab, where its newest tokens begin and how many they are, how many of them ask, and their queries' row
const int at = int(threadgroup_position_in_grid.z) * 5, recent = batch[at + 2], tokens = batch[at + 3];
const int group = queries_shape[1] / heads, all_rows = group * tokens;
const int first_row = int(threadgroup_position_in_grid.x) * S * 8;
if (first_row >= all_rows) return;  // the same for all threads: other rows have more tokens
const size_t start = batch[at + 1], query_row = batch[at + 4];
const int flat = batch[at] * layer[1] + layer[0] + head, begin = offsets[flat], kept = offsets[flat + 1] - begin;
const device T* head_keys = recent_keys + head * recent_keys_strides[1] + start * recent_keys_strides[2];
const device T* head_values = recent_values + head * recent_values_strides[1] + start * recent_values_strides[2];
const float scale = scaling[0] * LOG2E;

// where a lane stands in a block
const int y = int((lane / 4 & 4) + lane / 2 % 4), x = int((lane / 4 & 2) * 2 + lane % 2 * 2);
const int row = first_row + int(warp) * 8 + y;
const bool real = row < all_rows;
const int token = real ? row / group : 0;
const int query_head = head * group + (real ? row % group : 0);
const size_t place = (query_row * queries_shape[1] + query_head) * queries_shape[2] + token;
const device T* own_query = queries + query_row * queries_strides[0] + query_head * queries_strides[1] + token * queries_strides[2];
const int unseen = CAUSAL ? recent - tokens + 1 : recent;  // of the recent window, for the first token, past it
const int visible = kept + unseen + (CAUSAL ? token : 0);
const int last_token = (min(first_row + S * 8, all_rows) - 1) / group;
const int entries = kept + unseen + (CAUSAL ? last_token : 0);

threadgroup T tg_keys[N * (D + PAD)];
threadgroup T tg_values[N * (V + PAD)];
simdgroup_matrix<float, 8, 8> query[E];
simdgroup_matrix<float, 8, 8> out[F];
simdgroup_matrix<float, 8, 8> weight[C];
simdgroup_matrix<float, 8, 8> block;
float top = LOWEST, sum = 0.0f;
UNROLL for (int i = 0; i < E; i++) {
  UNROLL for (int k = 0; k < 2; k++) {
    query[i].thread_elements()[k] = real ? float(own_query[(i * 8 + x + k) * queries_strides[3]]) * scale : 0.0f;
  }
}
UNROLL for (int f = 0; f < F; f++) {
  UNROLL for (int k = 0; k < 2; k++) out[f].thread_elements()[k] = 0.0f;
}

for (int tile = 0; tile < entries; tile += N) {
  for (int j = int(warp); j < N; j += S) {
    const int entry = tile + j;
    const bool pooled = entry < kept, there = entry < entries;
    const size_t slot = pooled && there ? table[begin + entry] : 0;
    if (pooled) {
      copy_kept<D, KB, KG, T>(tg_keys + j * (D + PAD), (const device T*)keys, slot, lane, there);
      copy_kept<V, VB, VG, T>(tg_values + j * (V + PAD), (const device T*)values, slot, lane, there);
    } else {
      const device T* k = head_keys + (entry - kept) * recent_keys_strides[2];
      const device T* v = head_values + (entry - kept) * recent_values_strides[2];
      copy_row<D>(tg_keys + j * (D + PAD), k, lane, recent_keys_strides[3], there);
      copy_row<V>(tg_values + j * (V + PAD), v, lane, recent_values_strides[3], there);
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);

  float new_top = top;
  UNROLL for (int c = 0; c < C; c++) {
    UNROLL for (int k = 0; k < 2; k++) weight[c].thread_elements()[k] = 0.0f;
    UNROLL for (int i = 0; i < E; i++) {
      UNROLL for (int k = 0; k < 2; k++) {
        block.thread_elements()[k] = float(tg_keys[(c * 8 + x + k) * (D + PAD) + i * 8 + y]);
      }
      simdgroup_multiply_accumulate(weight[c], query[i], block, weight[c]);
    }
    UNROLL for (int k = 0; k < 2; k++) {
      float logit = weight[c].thread_elements()[k];
      weight[c].thread_elements()[k] = logit;
      if (tile + c * 8 + x + k < visible) new_top = max(new_top, logit);
    }
  }
  // four lanes share a row
  new_top = max(new_top, simd_shuffle_xor(new_top, 1));
  new_top = max(new_top, simd_shuffle_xor(new_top, 8));
  const float old = fast::exp2(top - new_top);
  top = new_top;
  sum *= old;
  UNROLL for (int c = 0; c < C; c++) {
    UNROLL for (int k = 0; k < 2; k++) {
      const bool seen = tile + c * 8 + x + k < visible;
      const float p = seen ? fast::exp2(weight[c].thread_elements()[k] - top) : 0.0f;
      weight[c].thread_elements()[k] = p;
      sum += p;
    }
  }
  UNROLL for (int f = 0; f < F; f++) {
    UNROLL for (int k = 0; k < 2; k++) out[f].thread_elements()[k] *= old;
    UNROLL for (int c = 0; c < C; c++) {
      UNROLL for (int k = 0; k < 2; k++) {
        block.thread_elements()[k] = float(tg_values[(c * 8 + y) * (V + PAD) + f * 8 + x + k]);
      }
      simdgroup_multiply_accumulate(out[f], weight[c], block, out[f]);
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
}

sum += simd_shuffle_xor(sum, 1);
sum += simd_shuffle_xor(sum, 8);
float share = 1.0f;
if (SINKS) {
  const float sink = float(sinks[query_head * sinks_strides[0]]) * LOG2E;
  const float new_top = max(top, sink);
  share = fast::exp2(top - new_top);
  sum = sum * share + fast::exp2(sink - new_top);
}
if (real) {
  UNROLL for (int f = 0; f < F; f++) {
    UNROLL for (int k = 0; k < 2; k++) {
      attended[place * V + f * 8 + x + k] = T(out[f].thread_elements()[k] * share / sum);
    }
  }
}
