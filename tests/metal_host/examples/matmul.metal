// out = a @ b with 8 x 8 simdgroup matrices; one simdgroup per tile of the result, sizes multiples of 8.
const uint n = uint(b_shape[1]), inner = uint(b_shape[0]);
const uint2 corner = threadgroup_position_in_grid.xy * 8;
simdgroup_float8x8 sum = make_filled_simdgroup_matrix<float>(0.0f);
for (uint k = 0; k < inner; k += 8) {
  simdgroup_half8x8 left, right;
  simdgroup_load(left, a + corner.y * inner + k, inner);
  simdgroup_load(right, b + k * n + corner.x, n);
  simdgroup_multiply_accumulate(sum, left, right, sum);
}
simdgroup_store(sum, out + corner.y * n + corner.x, n);
