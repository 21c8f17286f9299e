// exp(x) - 1 without cancellation (Kahan), for x <= 0; Metal has none.
METAL_FUNC float exp_minus_1(float x) {
  const float u = precise::exp(x);
  if (u == 1.0f) return x;
  const float difference = u - 1.0f;
  return difference == -1.0f ? -1.0f : difference * x / precise::log(u);
}
// Log of an entry's predicted utility, age·log β, and with a look-ahead of K steps + log((1 - β^K) / (1 - β)).
METAL_FUNC float utility(float log_beta, int age, int steps) {
  const float result = float(age + 1) * log_beta;
  if (steps <= 1) return result;
  // below this the ratio is K to float precision, and 0/0 at log β = 0
  const bool flat = fabs(log_beta) < 1e-30f;
  const float safe = flat ? -1.0f : log_beta;
  return result + precise::log(flat ? float(steps) : exp_minus_1(float(steps) * safe) / exp_minus_1(safe));
}
