// Newest tokens of several rows one after another: of each those of its window, then those of a chunk.
// where: of each token the row of the chunk and its place there, or -1 less the slab of a window and its place there.
// A simdgroup copies one token's key and value of one head: grid (tokens by S, heads).
const uint lane = thread_index_in_simdgroup;
const int token = int(threadgroup_position_in_grid.x) * S + int(simdgroup_index_in_threadgroup);
const int head = int(threadgroup_position_in_grid.y), count = tokens[0];
if (token >= count) return;
const int from = where[token * 2], place = where[token * 2 + 1];
const bool fresh = from >= 0;
const size_t row = fresh ? from : -1 - from, h = head, t = place;
const size_t own = h * count + token;
for (int d = int(lane); d < D; d += 32) {
  packed_keys[own * D + d] =
      fresh ? keys[row * keys_strides[0] + h * keys_strides[1] + t * keys_strides[2] + d * keys_strides[3]]
            : window_keys[row * window_keys_strides[0] + h * window_keys_strides[1] + t * window_keys_strides[2] +
                          d * window_keys_strides[3]];
}
for (int d = int(lane); d < V; d += 32) {
  packed_values[own * V + d] =
      fresh ? values[row * values_strides[0] + h * values_strides[1] + t * values_strides[2] + d * values_strides[3]]
            : window_values[row * window_values_strides[0] + h * window_values_strides[1] +
                            t * window_values_strides[2] + d * window_values_strides[3]];
}
