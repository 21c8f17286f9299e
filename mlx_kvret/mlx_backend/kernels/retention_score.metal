// Log of an entry's predicted utility, age·log β, and with a look-ahead of K steps + log((1 - β^K) / (1 - β)).
// numbers: seen, K, entries.
const int at = int(thread_position_in_grid.x);
if (at < numbers[2]) {
  const float log_beta = retention[at];
  float result = float(numbers[0] + 1 - position[at]) * log_beta;
  if (LOOKAHEAD) {
    const float steps = float(numbers[1]);
    // below this the ratio is K to float precision, and 0/0 at log β = 0
    const bool flat = fabs(log_beta) < 1e-30f;
    const float safe = flat ? -1.0f : log_beta;
    result += precise::log(flat ? steps : exp_minus_1(steps * safe) / exp_minus_1(safe));
  }
  score[at] = result;
}
