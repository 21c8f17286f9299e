// The gradient of bilinear with respect to x and points; a simdgroup per point, its lanes take the channels.
// Outputs are atomic and start at 0.
const uint lane = thread_index_in_simdgroup;
const uint point = thread_position_in_grid.x / 32;
const int height = x_shape[1], width = x_shape[2], channels = x_shape[3];
const int image = int(point) / points_shape[1];
const float2 p = ((const device float2*)points)[point];
const float2 corner = floor(p);
float2 slope = 0.0f;
for (int dy = 0; dy < 2; dy++)
  for (int dx = 0; dx < 2; dx++) {
    const int px = int(corner.x) + dx, py = int(corner.y) + dy;
    if (px < 0 || px >= width || py < 0 || py >= height) continue;
    const float2 near = 1.0f - abs(p - float2(px, py));
    for (int c = int(lane); c < channels; c += 32) {
      const int at = ((image * height + py) * width + px) * channels + c;
      const float g = cotangent[point * uint(channels) + uint(c)];
      atomic_fetch_add_explicit(&x_grad[at], near.x * near.y * g, memory_order_relaxed);
      slope += float2(dx ? near.y : -near.y, dy ? near.x : -near.x) * x[at] * g;
    }
  }
slope = simd_sum(slope);
if (lane == 0) {
  atomic_fetch_add_explicit(&points_grad[point * 2], slope.x, memory_order_relaxed);
  atomic_fetch_add_explicit(&points_grad[point * 2 + 1], slope.y, memory_order_relaxed);
}
