// The clip rule: what multiplies -A in a token's loss, and in its gradient, given ratio and advantage A. The table of
// its cases stands in aepo_kernels/reference/clip_rule.py; a rule that needs a new number adds it to the list here.
#pragma once

namespace aepo {

// An objective as numbers: the one list of them, in the order of ObjectiveNumbers of aepo_kernels/objective.py, which
// says what they mean. The flags are 0 or 1.
#define AEPO_OBJECTIVE_NUMBERS(X) \
  X(low)                          \
  X(high)                         \
  X(grad_low)                     \
  X(grad_high)                    \
  X(dual_clip)                    \
  X(detached_ratio)               \
  X(entropy_advantage)            \
  X(clamp_factor)                 \
  X(kl_coef)                      \
  X(kl_estimator)                 \
  X(entropy_bonus)                \
  X(importance_cap)

struct ObjectiveNumbers {
#define AEPO_FIELD(name) double name;
  AEPO_OBJECTIVE_NUMBERS(AEPO_FIELD)
#undef AEPO_FIELD
};

struct Clipped {
  double value;               // of -A (of -A logprob where the ratio is detached) in the loss
  double slope;               // of -A in the gradient
  bool above, below, beyond;  // at the upper bound, at the lower one, at the dual clip
};

// A NaN ratio holds no case, so it stays visible.
inline Clipped clip_rule(const ObjectiveNumbers& numbers, double ratio, double advantage) {
  const bool above = ratio > numbers.high, below = ratio < numbers.low, beyond = ratio > numbers.dual_clip;
  if (numbers.detached_ratio != 0) {
    const double value = above ? numbers.high : below ? numbers.low : ratio;
    return {value, value, above, below, false};
  }
  const bool up = advantage > 0, down = advantage < 0;
  const double value = above && up      ? numbers.high
                       : beyond && down ? numbers.dual_clip
                       : below && down  ? numbers.low
                                        : ratio;
  const double slope = above && up      ? numbers.grad_high
                       : beyond && down ? 0
                       : below && down  ? numbers.grad_low
                                        : ratio;
  return {value, slope, above && up, below && down, beyond && down};
}

}  // namespace aepo
