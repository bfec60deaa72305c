// The O(T) part of every policy loss; the formulas stand in aepo_kernels/reference/policy_terms.py.
#pragma once

#include <cstdint>

#include "clip_rule.h"

namespace aepo {

// What is measured beside the loss: the one list, in the order of METRICS of aepo_kernels/objective.py.
#define AEPO_POLICY_METRICS(X) \
  X(clip_fraction_high)        \
  X(clip_fraction_low)         \
  X(dual_clip_fraction)        \
  X(ratio_mean)                \
  X(ratio_max)                 \
  X(approx_kl)                 \
  X(entropy_mean)              \
  X(entropy_std)               \
  X(advantage_flips)           \
  X(kl)                        \
  X(valid_tokens)

struct PolicyMetrics {
#define AEPO_FIELD(name) double name;
  AEPO_POLICY_METRICS(AEPO_FIELD)
#undef AEPO_FIELD
};
constexpr int64_t kNumPolicyMetrics = sizeof(PolicyMetrics) / sizeof(double);

// Real is float or double; optional arrays may be null. A masked token may hold NaN anywhere.
template <class Real>
struct PolicyInputs {
  int64_t num_tokens;
  const Real* logprobs;          // [T]
  const Real* old_logprobs;      // [T]
  const Real* advantages;        // [T]
  const Real* weight;            // [T], share of the token in the loss; without counts 0 = masked
  const Real* counts;            // [T], optional: how often each token stands for itself, 0 = masked
  const Real* entropy;           // [T], optional
  const Real* ref_logprobs;      // [T], optional
  const Real* rollout_logprobs;  // [T], optional
  const Real* entropy_stats;     // mean, std; optional
  int64_t num_sequences;
  const int64_t* cu_seqlens;  // [num_sequences + 1], optional: given means one ratio per sequence

  // How often token t counts, 0 = masked.
  double times(int64_t t) const { return counts != nullptr ? static_cast<double>(counts[t]) : weight[t] != 0; }
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
void policy_terms(const ObjectiveNumbers& numbers, const PolicyInputs<Real>& in, const PolicyOutputs<Real>& out);

// What policy_terms writes for one token, where that follows from this token alone: one ratio per token, and no
// entropy-aware advantage without given statistics.
template <class Real>
struct TokenGrads {
  Real logprob, entropy;
};
template <class Real>
TokenGrads<Real> token_grads(const ObjectiveNumbers& numbers, const PolicyInputs<Real>& in, int64_t token);

}  // namespace aepo
