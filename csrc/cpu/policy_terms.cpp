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

  void add(double x) {
    count += 1;
    const double delta = x - mean;
    mean += delta / count;
    m2 += delta * (x - mean);
  }
  double std() const { return std::sqrt(m2 / std::max(count - 1, 1.0)); }
};

struct Kl {
  double value, slope;  // slope in logprob
};

// exp(x) - 1 - x, which is inf at inf, where the difference would be NaN.
double excess(double x) { return std::isinf(x) ? HUGE_VAL : std::expm1(x) - x; }

// A factor of 0 makes the product 0, also beside an infinite one, except that NaN stays.
double product(double a, double b, double c, bool visible) {
  return !visible && (a == 0 || b == 0 || c == 0) ? 0 : a * b * c;
}

Kl kl_term(int64_t estimator, double x) {  // x = ref_logprob - logprob
  if (estimator == 1) return {-x, 1};
  if (estimator == 2) return {x * x / 2, -x};
  return {excess(x), -std::expm1(x)};
}

template <class Real>
class PolicyLoss {
 public:
  PolicyLoss(const PolicyObjective& objective, const PolicyInputs<Real>& in, const PolicyOutputs<Real>& out)
      : o_(objective), in_(in), out_(out) {
    if (in.entropy != nullptr) {
      for (int64_t t = 0; t < in.num_tokens; t++) {
        if (valid(t)) moments_.add(in.entropy[t]);
      }
    }
    mean_ = in.entropy_stats != nullptr ? static_cast<double>(in.entropy_stats[0]) : moments_.mean;
    std_ = in.entropy_stats != nullptr ? static_cast<double>(in.entropy_stats[1]) : moments_.std();
    // Such entropies are equal, and their factor is 1: ENTROPY_NOISE_ULPS of aepo_kernels/objective.py.
    if (std_ <= 8 * static_cast<double>(std::numeric_limits<Real>::epsilon()) * std::abs(mean_)) std_ = 0;
  }

  void run() {
    if (in_.cu_seqlens == nullptr) {
      for (int64_t t = 0; t < in_.num_tokens; t++) {
        const double policy_grad = valid(t) ? add_token(t, std::exp(log_ratio(t))) : 0;
        write_grads(t, policy_grad);
      }
    } else {
      for (int64_t s = 0; s < in_.num_sequences; s++) add_sequence(in_.cu_seqlens[s], in_.cu_seqlens[s + 1]);
    }
    write_totals();
  }

 private:
  bool valid(int64_t t) const { return in_.weight[t] != 0; }
  double log_ratio(int64_t t) const { return static_cast<double>(in_.logprobs[t]) - in_.old_logprobs[t]; }

  // One ratio for the tokens [begin, end). Its gradient is ratio / n for each of the n valid ones, so they share the
  // mean of their gradients; a detached ratio has none, and each keeps its own.
  void add_sequence(int64_t begin, int64_t end) {
    double count = 0, sum = 0, grad = 0;
    for (int64_t t = begin; t < end; t++) {
      if (!valid(t)) continue;
      count += 1;
      sum += log_ratio(t);
    }
    const double ratio = std::exp(sum / std::max(count, 1.0));
    for (int64_t t = begin; t < end; t++) {
      const double own = valid(t) ? add_token(t, ratio) : 0;
      grad += own;
      if (o_.detached_ratio) write_grads(t, own);
    }
    if (o_.detached_ratio) return;
    for (int64_t t = begin; t < end; t++) write_grads(t, grad / std::max(count, 1.0));
  }

  double advantage_factor(int64_t t) {
    if (o_.entropy_advantage == 0 || std_ == 0) return 1;
    const double factor = 1 + o_.entropy_advantage * (in_.entropy[t] - mean_) / std_;
    flips_ += factor < 0;
    return o_.clamp_factor && factor < 0 ? 0 : factor;
  }

  // Add a valid token to the loss and the metrics; returns the gradient of its policy term in its own log-ratio (in its
  // log-prob if the ratio is detached). A NaN ratio meets no condition, so it shows in the result.
  double add_token(int64_t t, double ratio) {
    const double weight = in_.weight[t], logprob = in_.logprobs[t];
    const double a = in_.advantages[t] * advantage_factor(t);
    const bool high = ratio > o_.high && (a > 0 || o_.detached_ratio);
    const bool low = ratio < o_.low && (a < 0 || o_.detached_ratio);
    const bool dual = a < 0 && ratio > o_.dual_clip && !o_.detached_ratio;
    const double clipped = high ? o_.high : dual ? o_.dual_clip : low ? o_.low : ratio;
    double factor = clipped;
    if (!o_.detached_ratio) factor = high ? o_.grad_high : dual ? 0 : low ? o_.grad_low : ratio;
    const double old_logprob = in_.old_logprobs[t];
    bool visible = std::isnan(logprob) || std::isnan(old_logprob) || !std::isfinite(a);
    double importance = 1;
    if (in_.rollout_logprobs != nullptr) {
      importance = std::exp(old_logprob - in_.rollout_logprobs[t]);
      if (importance > o_.importance_cap) importance = o_.importance_cap;
      visible = visible || std::isnan(in_.rollout_logprobs[t]);
    }

    double loss = product(-a, clipped, importance, visible);
    if (o_.detached_ratio) loss = product(loss, logprob, 1, visible);
    if (in_.ref_logprobs != nullptr) {
      const double kl = kl_term(o_.kl_estimator, in_.ref_logprobs[t] - logprob).value;
      kl_ += kl;
      if (o_.kl_coef != 0) loss += o_.kl_coef * kl;
    }
    if (o_.entropy_bonus != 0) loss -= o_.entropy_bonus * in_.entropy[t];
    loss_ += weight * loss;

    const double d = log_ratio(t);
    count_ += 1;
    clip_high_ += high;
    clip_low_ += low;
    dual_clip_ += dual;
    ratio_ += ratio;
    ratio_max_ = std::max(ratio_max_, ratio);
    approx_kl_ += excess(d);
    return weight * product(-a, factor, importance, visible);
  }

  void write_grads(int64_t t, double policy_grad) const {
    const bool counts = valid(t);
    double grad = counts ? policy_grad : 0;
    if (counts && in_.ref_logprobs != nullptr && o_.kl_coef != 0) {
      const double x = static_cast<double>(in_.ref_logprobs[t]) - in_.logprobs[t];
      grad += in_.weight[t] * o_.kl_coef * kl_term(o_.kl_estimator, x).slope;
    }
    out_.grad_logprobs[t] = static_cast<Real>(grad);
    if (out_.grad_entropy != nullptr) {
      out_.grad_entropy[t] = static_cast<Real>(counts ? -in_.weight[t] * o_.entropy_bonus : 0);
    }
  }

  void write_totals() const {
    const double n = std::max(count_, 1.0);
    double metrics[kNumPolicyMetrics];
    metrics[kClipFractionHigh] = clip_high_ / n;
    metrics[kClipFractionLow] = clip_low_ / n;
    metrics[kDualClipFraction] = dual_clip_ / n;
    metrics[kRatioMean] = ratio_ / n;
    metrics[kRatioMax] = std::isnan(ratio_) ? ratio_ : ratio_max_;  // std::max passes NaN by
    metrics[kApproxKl] = approx_kl_ / n;
    metrics[kEntropyMean] = moments_.mean;
    metrics[kEntropyStd] = moments_.std();
    metrics[kAdvantageFlips] = flips_;
    metrics[kKl] = kl_ / n;
    metrics[kValidTokens] = count_;
    for (int i = 0; i < kNumPolicyMetrics; i++) out_.metrics[i] = static_cast<Real>(metrics[i]);
    *out_.loss = static_cast<Real>(loss_);
  }

  const PolicyObjective& o_;
  const PolicyInputs<Real>& in_;
  const PolicyOutputs<Real>& out_;
  Moments moments_;
  double mean_, std_;  // of the entropy, as the advantage factor uses them
  double loss_ = 0, count_ = 0, clip_high_ = 0, clip_low_ = 0, dual_clip_ = 0;
  double ratio_ = 0, ratio_max_ = 0, approx_kl_ = 0, flips_ = 0, kl_ = 0;
};

}  // namespace

template <class Real>
void policy_terms(const PolicyObjective& objective, const PolicyInputs<Real>& in, const PolicyOutputs<Real>& out) {
  PolicyLoss<Real>(objective, in, out).run();
}

template void policy_terms(const PolicyObjective&, const PolicyInputs<float>&, const PolicyOutputs<float>&);
template void policy_terms(const PolicyObjective&, const PolicyInputs<double>&, const PolicyOutputs<double>&);

}  // namespace aepo
