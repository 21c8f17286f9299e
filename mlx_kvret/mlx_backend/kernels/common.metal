// Shared by the attention kernels. A lane of a simdgroup holds the elements lane*E .. lane*E + E - 1 of a row of D.

// Loops over arrays that have to stay in registers.
#define UNROLL _Pragma("clang loop unroll(full)")

// What a softmax starts from; finite, so that a difference of two of them is 0 and no infinity is ever computed with.
constant constexpr float LOWEST = -3.0e38f;

template <int D, int E, typename P>
METAL_FUNC void load_row(thread float* out, P row, uint lane, long step) {
  if (step == 1) {
    UNROLL for (int i = 0; i < E; i++) out[i] = int(lane) * E + i < D ? float(row[lane * E + i]) : 0.0f;
  } else {
    UNROLL for (int i = 0; i < E; i++) out[i] = int(lane) * E + i < D ? float(row[(lane * E + i) * step]) : 0.0f;
  }
}

// The same row into threadgroup memory, by one simdgroup; zeros if there is no such row.
template <int D, typename T, typename P>
METAL_FUNC void copy_row(threadgroup T* out, P row, uint lane, long step, bool there) {
  for (int d = int(lane); d < D; d += 32) out[d] = there ? row[d * step] : T(0);
}

// A layer's entries as one list: each head's kept ones, then its recent window. Piece i of n takes an equal share.
METAL_FUNC int piece_start(long entries, int piece, int pieces) { return int(entries * piece / pieces); }
// The last piece that starts at or before an entry; no smaller one that is not empty holds it.
METAL_FUNC int piece_of(long entries, int entry, int pieces) { return int(((entry + 1L) * pieces - 1) / entries); }

// Softmax attention of B query rows, advanced entry by entry (Milakov & Gimelshein, arXiv 1805.02867).
template <int B, int E, int F> struct Rows {
  float query[B][E], sum[B], top[B], out[B][F];
  int visible[B];  // entries of the head that the row may see

  METAL_FUNC void start() {
    UNROLL for (int j = 0; j < B; j++) {
      top[j] = LOWEST;
      sum[j] = 0.0f;
      UNROLL for (int i = 0; i < F; i++) out[j][i] = 0.0f;
    }
  }

  METAL_FUNC void take(const thread float* key, const thread float* value, int entry) {
    UNROLL for (int j = 0; j < B; j++) {
      float logit = 0.0f;
      UNROLL for (int i = 0; i < E; i++) logit += query[j][i] * key[i];
      logit = simd_sum(logit);
      const bool seen = entry < visible[j];
      const float new_top = seen ? max(top[j], logit) : top[j];
      const float old = fast::exp(top[j] - new_top);
      const float weight = seen ? fast::exp(logit - new_top) : 0.0f;
      sum[j] = sum[j] * old + weight;
      UNROLL for (int i = 0; i < F; i++) out[j][i] = out[j][i] * old + weight * value[i];
      top[j] = new_top;
    }
  }
};
