// Shared by the selection kernels: candidates as numbers whose order is the order of keeping.

// The bits of a float, in the same order; NaN counts as the lowest, -0 as 0.
METAL_FUNC uint ordered(float score) {
  uint bits = as_type<uint>(score);
  if ((bits & 0x7fffffffu) > 0x7f800000u) bits = 0xff800000u;
  if (bits == 0x80000000u) bits = 0;
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}

// 34 bits: 0 for no entry, else 1, or 2 if it must stay, above the score.
METAL_FUNC ulong keeping_rank(float score, bool must) { return ulong(must ? 2 : 1) << 32 | ordered(score); }

// Among equals the newer token is kept, then the lower head: the smaller number.
METAL_FUNC ulong tie_rank(int position, int head, int seen, int heads) {
  return ulong(seen - position) * ulong(heads + 1) + ulong(head);
}
