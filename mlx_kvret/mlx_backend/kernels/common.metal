// Shared by the attention kernels. A lane of a simdgroup holds the elements lane*E .. lane*E + E - 1 of a row of D.

// Loops over arrays that have to stay in registers.
#define UNROLL _Pragma("clang loop unroll(full)")

// What a softmax starts from; finite, so that a difference of two of them is 0 and no infinity is ever computed with.
constant constexpr float LOWEST = -3.0e38f;
// Logits are of base 2, which the GPU's exponential is too.
constant constexpr float LOG2E = 1.44269504f;

template <int D, int E, typename P>
METAL_FUNC void load_row(thread float* out, P row, uint lane, long step) {
  if (step == 1) {
    UNROLL for (int i = 0; i < E; i++) out[i] = int(lane) * E + i < D ? float(row[lane * E + i]) : 0.0f;
  } else {
    UNROLL for (int i = 0; i < E; i++) out[i] = int(lane) * E + i < D ? float(row[(lane * E + i) * step]) : 0.0f;
  }
}

// A row of packed words: D codes of BITS bits, then scale and bias (T) of each GROUP of them.
template <int D, int E, int BITS, int GROUP, typename T>
METAL_FUNC void load_packed(thread float* out, const device uint* row, uint lane) {
  constexpr int WIDTH = E * BITS;  // bits of a lane
  constexpr uint MASK = (1u << BITS) - 1u;
  const int first = int(lane) * E;
  const device T* pairs = (const device T*)(row + D * BITS / 32);
  if (WIDTH % 32 == 0) {
    UNROLL for (int w = 0; w < WIDTH / 32; w++) {
      const uint word = row[int(lane) * (WIDTH / 32) + w];
      UNROLL for (int k = 0; k < 32 / BITS; k++) out[w * (32 / BITS) + k] = float(word >> (k * BITS) & MASK);
    }
  } else if (WIDTH == 16) {
    const uint word = ((const device ushort*)row)[lane];
    UNROLL for (int i = 0; i < E; i++) out[i] = float(word >> (i * BITS) & MASK);
  } else {
    UNROLL for (int i = 0; i < E; i++) {
      const int bit = (first + i) * BITS;
      out[i] = float(uint(((const device uchar*)row)[bit / 8]) >> (bit % 8) & MASK);
    }
  }
  if (GROUP % E == 0) {
    const float scale = float(pairs[first / GROUP * 2]), bias = float(pairs[first / GROUP * 2 + 1]);
    UNROLL for (int i = 0; i < E; i++) out[i] = scale * out[i] + bias;
  } else {
    UNROLL for (int i = 0; i < E; i++) {
      const int group = (first + i) / GROUP * 2;
      out[i] = float(pairs[group]) * out[i] + float(pairs[group + 1]);
    }
  }
}

// A kept entry's key or value: packed, or contiguous floats, with wide loads where lanes have whole ones.
template <int D, int E, int BITS, int GROUP, typename T>
METAL_FUNC void load_kept(thread float* out, const device T* rows, size_t slot, uint lane) {
  if (BITS > 0) {
    constexpr int WORDS = D * BITS / 32 + D / GROUP * int(sizeof(T)) / 2;
    load_packed<D, E, BITS == 0 ? 8 : BITS, GROUP, T>(out, (const device uint*)rows + slot * WORDS, lane);
  } else if (D % 128 == 0) {
    const device vec<T, 4>* row = (const device vec<T, 4>*)(rows + slot * D);
    UNROLL for (int i = 0; i + 3 < E; i += 4) {
      const vec<T, 4> four = row[(int(lane) * E + i) / 4];
      UNROLL for (int k = 0; k < 4; k++) out[i + k] = float(four[k]);
    }
  } else {
    load_row<D, E>(out, rows + slot * D, lane, 1);
  }
}

// A row into threadgroup memory, by one simdgroup; zeros if there is no such row.
template <int D, typename T, typename P>
METAL_FUNC void copy_row(threadgroup T* out, P row, uint lane, long step, bool there) {
  for (int d = int(lane); d < D; d += 32) out[d] = there ? row[d * step] : T(0);
}

// The same for a kept entry.
template <int D, int BITS, int GROUP, typename T>
METAL_FUNC void copy_kept(threadgroup T* out, const device T* rows, size_t slot, uint lane, bool there) {
  if (BITS == 0) {
    copy_row<D>(out, rows + slot * D, lane, 1, there);
    return;
  }
  constexpr int B = BITS == 0 ? 8 : BITS, WORDS = D * B / 32 + D / GROUP * int(sizeof(T)) / 2;
  const device uint* row = (const device uint*)rows + slot * WORDS;
  const device T* pairs = (const device T*)(row + D * B / 32);
  for (int d = int(lane); d < D; d += 32) {
    float x = 0.0f;
    if (there) {
      const uint code = row[d * B / 32] >> (d * B % 32) & ((1u << B) - 1u);
      x = float(pairs[d / GROUP * 2]) * float(code) + float(pairs[d / GROUP * 2 + 1]);
    }
    out[d] = T(x);
  }
}

// A row's entries in a layer as one list: each head's kept ones, then its recent window. Piece i of n takes an equal
// share; the first ones take one more where they do not divide.
METAL_FUNC int piece_start(int entries, int piece, int pieces) {
  return piece * (entries / pieces) + min(piece, entries % pieces);
}
// The piece that holds an entry.
METAL_FUNC int piece_of(int entries, int entry, int pieces) {
  const int each = entries / pieces, more = entries % pieces, longer = more * (each + 1);
  return entry < longer ? entry / (each + 1) : more + (entry - longer) / max(each, 1);
}

// Softmax attention of B query rows, advanced by P entries at a time (Milakov & Gimelshein, arXiv 1805.02867).
template <int B, int P, int E, int F> struct Rows {
  float query[B][E], sum[B], top[B], out[B][F], weight[B][P];
  int visible[B];  // entries of the head that the row may see

  METAL_FUNC void start() {
    UNROLL for (int j = 0; j < B; j++) {
      top[j] = LOWEST;
      sum[j] = 0.0f;
      UNROLL for (int i = 0; i < F; i++) out[j][i] = 0.0f;
    }
  }

  METAL_FUNC void look(const thread float* key, int p) {
    UNROLL for (int j = 0; j < B; j++) {
      float logit = 0.0f;
      UNROLL for (int i = 0; i < E; i++) logit += query[j][i] * key[i];
      weight[j][p] = simd_sum(logit);
    }
  }

  // Logits to weights; entry p of them is first + p * step, and those from `end` on are none.
  METAL_FUNC void weigh(int first, int step, int end) {
    UNROLL for (int j = 0; j < B; j++) {
      const int seen = min(visible[j], end);
      float new_top = top[j];
      UNROLL for (int p = 0; p < P; p++) {
        if (first + p * step < seen) new_top = max(new_top, weight[j][p]);
      }
      const float old = fast::exp2(top[j] - new_top);
      sum[j] *= old;
      UNROLL for (int i = 0; i < F; i++) out[j][i] *= old;
      UNROLL for (int p = 0; p < P; p++) {
        weight[j][p] = first + p * step < seen ? fast::exp2(weight[j][p] - new_top) : 0.0f;
        sum[j] += weight[j][p];
      }
      top[j] = new_top;
    }
  }

  METAL_FUNC void take(const thread float* value, int p) {
    UNROLL for (int j = 0; j < B; j++) {
      UNROLL for (int i = 0; i < F; i++) out[j][i] += weight[j][p] * value[i];
    }
  }
};
