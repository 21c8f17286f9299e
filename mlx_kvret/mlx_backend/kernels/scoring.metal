// exp(x) - 1 without cancellation (Kahan), for x <= 0; Metal has none.
METAL_FUNC float exp_minus_1(float x) {
  const float u = precise::exp(x);
  if (u == 1.0f) return x;
  const float difference = u - 1.0f;
  return difference == -1.0f ? -1.0f : difference * x / precise::log(u);
}
