// out = x transposed, through a 32 x 32 tile of threadgroup memory; threadgroups of 32 x 8.
threadgroup T tile[32][33];
const uint rows = uint(x_shape[0]), columns = uint(x_shape[1]);
const uint2 at = thread_position_in_threadgroup.xy;
const uint2 corner = threadgroup_position_in_grid.xy * 32;
for (uint dy = at.y; dy < 32; dy += 8)
  if (corner.y + dy < rows && corner.x + at.x < columns)
    tile[dy][at.x] = x[(corner.y + dy) * columns + corner.x + at.x];
threadgroup_barrier(mem_flags::mem_threadgroup);
for (uint dx = at.y; dx < 32; dx += 8)
  if (corner.x + dx < columns && corner.y + at.x < rows)
    out[(corner.x + dx) * rows + corner.y + at.x] = tile[at.x][dx];
