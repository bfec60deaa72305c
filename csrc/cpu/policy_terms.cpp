// A scalar loop: at 20 to 50 ns per token it is a thousandth of the time that the token's logits take.
#include "policy_terms.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace aepo {
namespace {

// Mean and unbiased standard deviation by Welford's update: equal values give a deviation of exactly 0, which
// E[x^2] - E[x]^2 does not.
struct Moments {
  double count = 0, mean = 0, m2 = 0;

  void add(double x, double times) {
    count += times;
    const double delta = x - mean;
    mean += delta * times / count;
    m2 += times * delta * (x - mean);
  }
  double std() const { return std::sqrt(m2 / std::max(count - 1, 1.0)); }
};

template <class Real>
Moments entropy_moments(const PolicyInputs<Real>& in) {
  Moments moments;
  if (in.entropy == nullptr) return moments;
  for (int64_t t = 0; t < in.num_tokens; t++) {
    if (in.times(t) != 0) moments.add(in.entropy[t], in.times(t));
  }
  return moments;
}

struct Kl {
  double value, slope;  // slope in logprob
};

// exp(x) - 1 - x, which is inf at inf, where the difference would be NaN.
double excess(double x) { return std::isinf(x) ? HUGE_VAL : std::expm1(x) - x; }

// A factor of 0 makes the product 0, also beside an infinite one, except that NaN stays.
double product(double a, double b, double c, bool visible) {
  return !visible && (a == 0 || b == 0 || c == 0) ? 0 : a * b * c;
}

Kl kl_term(double estimator, double x) {  // x = ref_logprob - logprob
  if (estimator == 1) return {-x, 1};
  if (estimator == 2) return {x * x / 2, -x};
  return {excess(x), -std::expm1(x)};
}

// What one valid token brings.
struct Term {
  Clipped clipped;
  bool flipped;  // its entropy turned its advantage around
  double loss;   // before its weight
  double kl;
  double grad;  // of its policy term in its own log-ratio (in its log-prob if the ratio is detached), with its weight
};

// The part of the loss that knows one token at a time.
template <class Real>
class Tokens {
 public:
  // entropy: of all tokens, where no statistics are given
  Tokens(const ObjectiveNumbers& numbers, const PolicyInputs<Real>& in, const Moments& entropy)
      : numbers_(numbers), in_(in), mean_(entropy.mean), std_(entropy.std()) {
    if (in.entropy_stats != nullptr) mean_ = in.entropy_stats[0], std_ = in.entropy_stats[1];
    // Such entropies are equal, and their factor is 1: ENTROPY_NOISE_ULPS of aepo_kernels/objective.py.
    if (std_ <= 8 * static_cast<double>(std::numeric_limits<Real>::epsilon()) * std::abs(mean_)) std_ = 0;
  }

  double log_ratio(int64_t t) const { return static_cast<double>(in_.logprobs[t]) - in_.old_logprobs[t]; }

  // A NaN ratio meets no condition, so it shows in the result.
  Term term(int64_t t, double ratio) const {
    const double logprob = in_.logprobs[t], old_logprob = in_.old_logprobs[t];
    const double factor = advantage_factor(t);
    const double a = in_.advantages[t] * (numbers_.clamp_factor != 0 && factor < 0 ? 0 : factor);
    const Clipped clipped = clip_rule(numbers_, ratio, a);
    bool visible = std::isnan(logprob) || std::isnan(old_logprob) || !std::isfinite(a);
    double importance = 1;
    if (in_.rollout_logprobs != nullptr) {
      importance = std::exp(old_logprob - in_.rollout_logprobs[t]);
      if (importance > numbers_.importance_cap) importance = numbers_.importance_cap;
      visible = visible || std::isnan(in_.rollout_logprobs[t]);
    }

    double loss = product(-a, clipped.value, importance, visible), kl = 0;
    if (numbers_.detached_ratio != 0) loss = product(loss, logprob, 1, visible);
    if (in_.ref_logprobs != nullptr) {
      kl = kl_term(numbers_.kl_estimator, in_.ref_logprobs[t] - logprob).value;
      if (numbers_.kl_coef != 0) loss += numbers_.kl_coef * kl;
    }
    if (numbers_.entropy_bonus != 0) loss -= numbers_.entropy_bonus * in_.entropy[t];
    return {clipped, factor < 0, loss, kl, in_.weight[t] * product(-a, clipped.slope, importance, visible)};
  }

  // The gradients that leave: that of the policy term, which a sequence may have shared out, and those of KL and bonus.
  TokenGrads<Real> grads(int64_t t, double policy_grad) const {
    if (in_.times(t) == 0) return {0, 0};
    double grad = policy_grad;
    if (in_.ref_logprobs != nullptr && numbers_.kl_coef != 0) {
      const double x = static_cast<double>(in_.ref_logprobs[t]) - in_.logprobs[t];
      grad += in_.weight[t] * numbers_.kl_coef * kl_term(numbers_.kl_estimator, x).slope;
    }
    return {static_cast<Real>(grad), static_cast<Real>(-in_.weight[t] * numbers_.entropy_bonus)};
  }

 private:
  double advantage_factor(int64_t t) const {
    if (numbers_.entropy_advantage == 0 || std_ == 0) return 1;
    return 1 + numbers_.entropy_advantage * (in_.entropy[t] - mean_) / std_;
  }

  const ObjectiveNumbers& numbers_;
  const PolicyInputs<Real>& in_;
  double mean_, std_;  // of the entropy, as the advantage factor uses them
};

// The sums over all tokens, and over those of a sequence.
template <class Real>
class PolicyLoss {
 public:
  PolicyLoss(const ObjectiveNumbers& numbers, const PolicyInputs<Real>& in, const PolicyOutputs<Real>& out)
      : detached_ratio_(numbers.detached_ratio != 0),
        in_(in),
        out_(out),
        entropy_(entropy_moments(in)),
        tokens_(numbers, in, entropy_) {}

  void run() {
    if (in_.cu_seqlens == nullptr) {
      for (int64_t t = 0; t < in_.num_tokens; t++) {
        write_grads(t, in_.times(t) != 0 ? add_token(t, std::exp(tokens_.log_ratio(t))) : 0);
      }
    } else {
      for (int64_t s = 0; s < in_.num_sequences; s++) add_sequence(in_.cu_seqlens[s], in_.cu_seqlens[s + 1]);
    }
    write_totals();
  }

 private:
  // One ratio for the tokens [begin, end), of which n count. Its gradient is ratio / n for each of these, so they share
  // the mean of their gradients; a detached ratio has none, and each keeps its own.
  void add_sequence(int64_t begin, int64_t end) {
    double n = 0, sum = 0, grad = 0;
    for (int64_t t = begin; t < end; t++) {
      const double times = in_.times(t);
      if (times == 0) continue;
      n += times;
      sum += times * tokens_.log_ratio(t);
    }
    const double ratio = std::exp(sum / std::max(n, 1.0));
    for (int64_t t = begin; t < end; t++) {
      const double own = in_.times(t) != 0 ? add_token(t, ratio) : 0;
      grad += own;
      if (detached_ratio_) write_grads(t, own);
    }
    if (detached_ratio_) return;
    for (int64_t t = begin; t < end; t++) write_grads(t, in_.times(t) * (grad / std::max(n, 1.0)));
  }

  // Add a valid token to the loss and the metrics; returns the gradient of its policy term.
  double add_token(int64_t t, double ratio) {
    const Term term = tokens_.term(t, ratio);
    const double times = in_.times(t);
    loss_ += in_.weight[t] * term.loss;
    sum_.clip_fraction_high += times * term.clipped.above;
    sum_.clip_fraction_low += times * term.clipped.below;
    sum_.dual_clip_fraction += times * term.clipped.beyond;
    sum_.ratio_mean += times * ratio;
    sum_.ratio_max = std::max(sum_.ratio_max, ratio);
    sum_.approx_kl += times * excess(tokens_.log_ratio(t));
    sum_.advantage_flips += times * term.flipped;
    sum_.kl += times * term.kl;
    sum_.valid_tokens += times;
    return term.grad;
  }

  void write_grads(int64_t t, double policy_grad) const {
    const TokenGrads<Real> grads = tokens_.grads(t, policy_grad);
    out_.grad_logprobs[t] = grads.logprob;
    if (out_.grad_entropy != nullptr) out_.grad_entropy[t] = grads.entropy;
  }

  void write_totals() const {
    PolicyMetrics metrics = sum_;
    const double n = std::max(sum_.valid_tokens, 1.0);
    for (double* mean : {&metrics.clip_fraction_high, &metrics.clip_fraction_low, &metrics.dual_clip_fraction,
                         &metrics.ratio_mean, &metrics.approx_kl, &metrics.kl}) {
      *mean /= n;
    }
    if (std::isnan(sum_.ratio_mean)) metrics.ratio_max = sum_.ratio_mean;  // std::max passes NaN by
    metrics.entropy_mean = entropy_.mean;
    metrics.entropy_std = entropy_.std();
    Real* to = out_.metrics;
#define AEPO_WRITE(name) *to++ = static_cast<Real>(metrics.name);
    AEPO_POLICY_METRICS(AEPO_WRITE)
#undef AEPO_WRITE
    *out_.loss = static_cast<Real>(loss_);
  }

  const bool detached_ratio_;
  const PolicyInputs<Real>& in_;
  const PolicyOutputs<Real>& out_;
  const Moments entropy_;
  const Tokens<Real> tokens_;
  PolicyMetrics sum_ = {};
  double loss_ = 0;
};

}  // namespace

template <class Real>
void policy_terms(const ObjectiveNumbers& numbers, const PolicyInputs<Real>& in, const PolicyOutputs<Real>& out) {
  PolicyLoss<Real>(numbers, in, out).run();
}

template <class Real>
TokenGrads<Real> token_grads(const ObjectiveNumbers& numbers, const PolicyInputs<Real>& in, int64_t t) {
  const Tokens<Real> tokens(numbers, in, Moments());
  return tokens.grads(t, in.times(t) != 0 ? tokens.term(t, std::exp(tokens.log_ratio(t))).grad : 0);
}

template void policy_terms(const ObjectiveNumbers&, const PolicyInputs<float>&, const PolicyOutputs<float>&);
template void policy_terms(const ObjectiveNumbers&, const PolicyInputs<double>&, const PolicyOutputs<double>&);
template TokenGrads<float> token_grads(const ObjectiveNumbers&, const PolicyInputs<float>&, int64_t);
template TokenGrads<double> token_grads(const ObjectiveNumbers&, const PolicyInputs<double>&, int64_t);

}  // namespace aepo
