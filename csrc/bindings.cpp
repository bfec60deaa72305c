// The native operations of training: torch.ops.aepo_native.*, called by aepo_kernels.ops after its checks. This file
// checks what memory safety needs, splits the work over threads and knows torch; the kernels know none of it. Those of
// decoding are in bindings_decode.cpp.
#include <Python.h>

#include <ATen/MemoryOverlap.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <cmath>
#include <cstring>
#include <string>
#include <tuple>
#include <vector>

#include "policy_terms.h"
#include "tensors.h"

namespace aepo {
namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor> token_stats(const Tensor& logits, const OptionalTensor& labels,
                                                       double temperature, int64_t ignore_index, bool skip_ignored,
                                                       int64_t vocab_start) {
  const Rows rows(logits, "logits");
  const int64_t* label = data<int64_t>(labels, "labels", rows.count);
  const auto ignored = [&](int64_t t) { return label != nullptr && label[t] == ignore_index; };
  std::vector<int64_t> used;  // listed first, so that threads stay balanced where most of a batch is skipped
  for (int64_t t = 0; t < rows.count; t++) {
    if (!(skip_ignored && ignored(t))) used.push_back(t);
  }

  const auto kernel = row_kernels().token_stats[rows.type];
  const int64_t segments = num_segments(rows.vocab), num_used = used.size();
  std::vector<SegmentStats> partial(num_used * segments);
  for_each_segment(num_used, rows.vocab, [&](int64_t i, int64_t column, int64_t n) {
    partial[i * segments + column / kSegment] = kernel(rows.at(used[i], column), n, log2_scale(temperature));
  });

  const auto options = logits.options().dtype(rows.acc);
  const Tensor logprobs = at::zeros({label == nullptr ? 0 : rows.count}, options);
  const Tensor entropy = at::zeros({rows.count}, options), maximum = at::zeros({rows.count}, options);
  const Tensor log_sum = at::zeros({rows.count}, options);
  const Column to_logprobs(label == nullptr ? OptionalTensor() : logprobs, "logprobs", rows);
  const Column to_entropy(entropy, "entropy", rows), to_maximum(maximum, "maximum", rows);
  const Column to_log_sum(log_sum, "log_sum", rows);
  at::parallel_for(0, num_used, 64, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) {
      const int64_t t = used[i];
      const RowStats stats = merge_segments(partial.data() + i * segments, segments, temperature);
      to_entropy.set(t, stats.entropy);
      to_maximum.set(t, stats.max);
      to_log_sum.set(t, stats.log_sum);
      if (label == nullptr) continue;
      double logprob = stats.max * 0;  // an ignored row has 0, or NaN if the row has no softmax
      if (!ignored(t)) {
        // A label out of range must not be read. The operations above this one raise for it on the CPU.
        const bool in_range = label[t] >= vocab_start && label[t] - vocab_start < rows.vocab;
        const double logit = in_range ? load_logit(rows.type, rows.at(t), label[t] - vocab_start) : std::nan("");
        logprob = label_logprob(logit, stats, temperature);
      }
      to_logprobs.set(t, logprob);
    }
  });
  return {logprobs, entropy, maximum, log_sum};
}

void logits_grad(const Tensor& logits, const OptionalTensor& labels, const Tensor& maximum, const Tensor& log_sum,
                 const Tensor& entropy, const OptionalTensor& grad_logprobs, const OptionalTensor& grad_entropy,
                 double temperature, int64_t ignore_index, const Tensor& out, int64_t vocab_start) {
  const Rows rows(logits, "logits"), grads(out, "out");
  TORCH_CHECK_VALUE(grads.type == rows.type && out.sizes() == logits.sizes(), "out must be like the logits, ",
                    logits.scalar_type(), " ", logits.sizes(), "; got ", out.scalar_type(), " ", out.sizes());
  at::assert_no_internal_overlap(out);
  at::assert_no_partial_overlap(out, logits);
  const int64_t* label = data<int64_t>(labels, "labels", rows.count);
  const Column max_of(maximum, "maximum", rows), log_sum_of(log_sum, "log_sum", rows);
  const Column entropy_of(entropy, "entropy", rows);
  const Column grad_logprob_of(grad_logprobs, "grad_logprobs", rows);
  const Column grad_entropy_of(grad_entropy, "grad_entropy", rows);
  TORCH_CHECK_VALUE(labels.has_value() || !grad_logprobs.has_value(), "grad_logprobs needs labels");
  const auto grad_logprob = [&](int64_t t) {
    return grad_logprob_of.given() && label[t] != ignore_index ? grad_logprob_of[t] : 0;
  };
  const auto grad_h = [&](int64_t t) { return grad_entropy_of.given() ? grad_entropy_of[t] : 0; };

  std::vector<int64_t> used, zero;  // a masked row may hold NaN, so a row without gradient is not read
  for (int64_t t = 0; t < rows.count; t++) (grad_logprob(t) != 0 || grad_h(t) != 0 ? used : zero).push_back(t);
  for_each_segment(zero.size(), rows.vocab, [&](int64_t i, int64_t column, int64_t n) {
    std::memset(grads.at(zero[i], column), 0, n * grads.element_bytes);
  });
  const auto kernel = row_kernels().logits_grad[rows.type];
  for_each_segment(used.size(), rows.vocab, [&](int64_t i, int64_t column, int64_t n) {
    const int64_t t = used[i];
    const RowStats stats = {max_of[t], log_sum_of[t], entropy_of[t]};
    const double gl = grad_logprob(t), gh = grad_h(t);
    const bool has_label = gl != 0 && label[t] >= vocab_start + column && label[t] - vocab_start < column + n;
    const int64_t at = has_label ? label[t] - vocab_start : 0;
    const double logit = has_label ? load_logit(rows.type, rows.at(t), at) : 0;  // before it is overwritten
    kernel(rows.at(t, column), grads.at(t, column), n, row_grad(stats, gl, gh, temperature));
    if (has_label) store_logit(rows.type, grads.at(t), at, label_grad(logit, stats, gl, gh, temperature));
  });
}

template <class Real>
std::tuple<Tensor, Tensor, Tensor, Tensor> policy_terms_of(
    const PolicyObjective& objective, const Tensor& logprobs, const Tensor& old_logprobs, const Tensor& advantages,
    const Tensor& weight, const OptionalTensor& entropy, const OptionalTensor& ref_logprobs,
    const OptionalTensor& rollout_logprobs, const OptionalTensor& cu_seqlens, const OptionalTensor& entropy_stats) {
  const int64_t n = logprobs.numel(), num_sequences = cu_seqlens.has_value() ? cu_seqlens->numel() - 1 : 0;
  PolicyInputs<Real> in;
  in.num_tokens = n;
  in.logprobs = data<Real>(logprobs, "logprobs", n);
  in.old_logprobs = data<Real>(old_logprobs, "old_logprobs", n);
  in.advantages = data<Real>(advantages, "advantages", n);
  in.weight = data<Real>(weight, "weight", n);
  in.entropy = data<Real>(entropy, "entropy", n);
  in.ref_logprobs = data<Real>(ref_logprobs, "ref_logprobs", n);
  in.rollout_logprobs = data<Real>(rollout_logprobs, "rollout_logprobs", n);
  in.num_sequences = num_sequences;
  in.cu_seqlens = data<int64_t>(cu_seqlens, "cu_seqlens", num_sequences + 1);
  in.entropy_stats = data<Real>(entropy_stats, "entropy_stats", 2);
  const bool has_bonus = objective.entropy_bonus != 0;
  TORCH_CHECK_VALUE(entropy.has_value() || (!has_bonus && objective.entropy_advantage == 0),
                    "entropy_advantage and entropy_bonus need entropy");
  for (int64_t s = 0; s < num_sequences; s++) {
    TORCH_CHECK_VALUE(in.cu_seqlens[s] >= 0 && in.cu_seqlens[s] <= in.cu_seqlens[s + 1] && in.cu_seqlens[s + 1] <= n,
                      "cu_seqlens must not decrease, within [0, ", n, "]; got ", in.cu_seqlens[s], " before ",
                      in.cu_seqlens[s + 1]);
  }

  const auto options = logprobs.options();
  Tensor loss = at::zeros({}, options), grad_logprobs = at::zeros({n}, options);
  Tensor grad_entropy = at::zeros({has_bonus ? n : 0}, options), metrics = at::zeros({kNumPolicyMetrics}, options);
  PolicyOutputs<Real> result;
  result.loss = loss.data_ptr<Real>();
  result.grad_logprobs = grad_logprobs.data_ptr<Real>();
  result.grad_entropy = has_bonus ? grad_entropy.data_ptr<Real>() : nullptr;
  result.metrics = metrics.data_ptr<Real>();
  policy_terms(objective, in, result);
  return {loss, grad_logprobs, grad_entropy, metrics};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> policy_terms_op(
    const Tensor& logprobs, const Tensor& old_logprobs, const Tensor& advantages, const Tensor& weight,
    const OptionalTensor& entropy, const OptionalTensor& ref_logprobs, const OptionalTensor& rollout_logprobs,
    const OptionalTensor& cu_seqlens, const OptionalTensor& entropy_stats, double low, double high, double grad_low,
    double grad_high, double dual_clip, bool detached_ratio, double entropy_advantage, bool clamp_factor,
    double kl_coef, int64_t kl_estimator, double entropy_bonus, double importance_cap) {
  const PolicyObjective objective = {low,       high,           grad_low,          grad_high,
                                     dual_clip, detached_ratio, entropy_advantage, clamp_factor,
                                     kl_coef,   kl_estimator,   entropy_bonus,     importance_cap};
  const auto run = logprobs.scalar_type() == at::kDouble ? policy_terms_of<double> : policy_terms_of<float>;
  return run(objective, logprobs, old_logprobs, advantages, weight, entropy, ref_logprobs, rollout_logprobs, cu_seqlens,
             entropy_stats);
}

std::string cpu_capability() { return row_kernels().name; }

}  // namespace
}  // namespace aepo

TORCH_LIBRARY(aepo_native, m) {
  m.def("cpu_capability() -> str", aepo::cpu_capability);
  m.def(
      "token_stats(Tensor logits, Tensor? labels, float temperature, int ignore_index, bool skip_ignored,"
      " int vocab_start=0) -> (Tensor logprobs, Tensor entropy, Tensor maximum, Tensor log_sum)");
  m.def(
      "logits_grad(Tensor logits, Tensor? labels, Tensor maximum, Tensor log_sum, Tensor entropy,"
      " Tensor? grad_logprobs, Tensor? grad_entropy, float temperature, int ignore_index, Tensor(a!) out,"
      " int vocab_start=0) -> ()");
  m.def(
      "policy_terms(Tensor logprobs, Tensor old_logprobs, Tensor advantages, Tensor weight, Tensor? entropy,"
      " Tensor? ref_logprobs, Tensor? rollout_logprobs, Tensor? cu_seqlens, Tensor? entropy_stats, float low,"
      " float high, float grad_low, float grad_high, float dual_clip, bool detached_ratio, float entropy_advantage,"
      " bool clamp_factor, float kl_coef, int kl_estimator, float entropy_bonus, float importance_cap)"
      " -> (Tensor loss, Tensor grad_logprobs, Tensor grad_entropy, Tensor metrics)");
}

TORCH_LIBRARY_IMPL(aepo_native, CPU, m) {
  m.impl("token_stats", aepo::token_stats);
  m.impl("logits_grad", aepo::logits_grad);
  m.impl("policy_terms", aepo::policy_terms_op);
}

// An empty module, so that `import aepo_kernels._C` loads this library and runs the registrations above.
PyMODINIT_FUNC PyInit__C() {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, 0, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
