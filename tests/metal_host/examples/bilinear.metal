// Samples images x (B, H, W, C) at points (B, P, 2) in pixels, linear between the four neighbours, 0 outside.
const uint i = thread_position_in_grid.x;
const int height = x_shape[1], width = x_shape[2], channels = x_shape[3];
const uint point = i / uint(channels);
const int c = int(i) % channels;
const int image = int(point) / points_shape[1];
const float2 p = ((const device float2*)points)[point];
const float2 corner = floor(p);
float sum = 0.0f;
for (int dy = 0; dy < 2; dy++)
  for (int dx = 0; dx < 2; dx++) {
    const int px = int(corner.x) + dx, py = int(corner.y) + dy;
    if (px >= 0 && px < width && py >= 0 && py < height) {
      const float2 near = 1.0f - abs(p - float2(px, py));
      sum += near.x * near.y * x[((image * height + py) * width + px) * channels + c];
    }
  }
out[i] = sum;
