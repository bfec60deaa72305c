// The O(T) part of every policy loss; the formulas stand in aepo_kernels/reference/policy_terms.py.
#pragma once

#include <cstdint>

namespace aepo {

enum PolicyMetric {
  kClipFractionHigh,
  kClipFractionLow,
  kDualClipFraction,
  kRatioMean,
  kRatioMax,
  kApproxKl,
  kEntropyMean,
  kEntropyStd,
  kAdvantageFlips,
  kKl,
  kValidTokens,
  kNumPolicyMetrics
};

// The objective in numbers.
struct PolicyObjective {
  double low, high;            // bounds of the ratio
  double grad_low, grad_high;  // factor of the gradient beyond them
  double dual_clip;            // inf = off
  bool detached_ratio;
  double entropy_advantage;  // 0 = off
  bool clamp_factor;
  double kl_coef;
  int64_t kl_estimator;  // 1, 2, 3
  double entropy_bonus;
  double importance_cap;  // inf = uncapped
};

// Real is float or double; optional arrays may be null.
template <class Real>
struct PolicyInputs {
  int64_t num_tokens;
  const Real* logprobs;          // [T]
  const Real* old_logprobs;      // [T]
  const Real* advantages;        // [T]
  const Real* weight;            // [T], 0 = masked: such a token may hold NaN anywhere
  const Real* entropy;           // [T], optional
  const Real* ref_logprobs;      // [T], optional
  const Real* rollout_logprobs;  // [T], optional
  int64_t num_sequences;
  const int64_t* cu_seqlens;  // [num_sequences + 1], optional: given means one ratio per sequence
  const Real* entropy_stats;  // mean, std; optional
};

template <class Real>
struct PolicyOutputs {
  Real* loss;           // [1]
  Real* grad_logprobs;  // [T]
  Real* grad_entropy;   // [T], null without an entropy bonus
  Real* metrics;        // [kNumPolicyMetrics]
};

// All arithmetic in float64, sums in token order.
template <class Real>
void policy_terms(const PolicyObjective& objective, const PolicyInputs<Real>& in, const PolicyOutputs<Real>& out);

}  // namespace aepo
