// Unsigned integers in the order of the floats.
inline uint rank_of(float score) {
  const uint bits = as_type<uint>(score);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
