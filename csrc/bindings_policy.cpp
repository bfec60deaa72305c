// The native operations that know the objective: the O(T) loss, and with it a whole loss in one visit to each row.
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <string>
#include <tuple>
#include <vector>

#include "policy_terms.h"
#include "tensors.h"

namespace aepo {
namespace {

// What this library was built for: aepo_kernels compares it with its own lists, because numbers travel by position.
#define AEPO_NAME(name) #name,
std::vector<std::string> objective_numbers() { return {AEPO_OBJECTIVE_NUMBERS(AEPO_NAME)}; }
std::vector<std::string> policy_metrics() { return {AEPO_POLICY_METRICS(AEPO_NAME)}; }
#undef AEPO_NAME

ObjectiveNumbers objective_numbers_of(at::ArrayRef<double> numbers) {
  constexpr size_t expected = sizeof(ObjectiveNumbers) / sizeof(double);
  TORCH_CHECK_VALUE(numbers.size() == expected, "numbers must be the ", expected, " of objective_numbers(); got ",
                    numbers.size());
  const double* next = numbers.data();
#define AEPO_NEXT(name) *next++,
  return {AEPO_OBJECTIVE_NUMBERS(AEPO_NEXT)};
#undef AEPO_NEXT
}

template <class Real>
std::tuple<Tensor, Tensor, Tensor, Tensor> policy_terms_of(
    const Tensor& logprobs, const Tensor& old_logprobs, const Tensor& advantages, const Tensor& weight,
    const OptionalTensor& counts, const OptionalTensor& entropy, const OptionalTensor& ref_logprobs,
    const OptionalTensor& rollout_logprobs, const OptionalTensor& cu_seqlens, const OptionalTensor& entropy_stats,
    at::ArrayRef<double> numbers) {
  const int64_t n = logprobs.numel(), num_sequences = cu_seqlens.has_value() ? cu_seqlens->numel() - 1 : 0;
  const ObjectiveNumbers objective = objective_numbers_of(numbers);
  PolicyInputs<Real> in;
  in.num_tokens = n;
  in.logprobs = data<Real>(logprobs, "logprobs", n);
  in.old_logprobs = data<Real>(old_logprobs, "old_logprobs", n);
  in.advantages = data<Real>(advantages, "advantages", n);
  in.weight = data<Real>(weight, "weight", n);
  in.counts = data<Real>(counts, "counts", n);
  in.entropy = data<Real>(entropy, "entropy", n);
  in.ref_logprobs = data<Real>(ref_logprobs, "ref_logprobs", n);
  in.rollout_logprobs = data<Real>(rollout_logprobs, "rollout_logprobs", n);
  in.entropy_stats = data<Real>(entropy_stats, "entropy_stats", 2);
  in.num_sequences = num_sequences;
  in.cu_seqlens = data<int64_t>(cu_seqlens, "cu_seqlens", num_sequences + 1);
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
    const OptionalTensor& counts, const OptionalTensor& entropy, const OptionalTensor& ref_logprobs,
    const OptionalTensor& rollout_logprobs, const OptionalTensor& cu_seqlens, const OptionalTensor& entropy_stats,
    at::ArrayRef<double> numbers) {
  const auto run = logprobs.scalar_type() == at::kDouble ? policy_terms_of<double> : policy_terms_of<float>;
  return run(logprobs, old_logprobs, advantages, weight, counts, entropy, ref_logprobs, rollout_logprobs, cu_seqlens,
             entropy_stats, numbers);
}

}  // namespace
}  // namespace aepo

TORCH_LIBRARY_FRAGMENT(aepo_native, m) {
  m.def("objective_numbers() -> str[]", aepo::objective_numbers);
  m.def("policy_metrics() -> str[]", aepo::policy_metrics);
  m.def(
      "policy_terms(Tensor logprobs, Tensor old_logprobs, Tensor advantages, Tensor weight, Tensor? counts,"
      " Tensor? entropy, Tensor? ref_logprobs, Tensor? rollout_logprobs, Tensor? cu_seqlens, Tensor? entropy_stats,"
      " float[] numbers) -> (Tensor loss, Tensor grad_logprobs, Tensor grad_entropy, Tensor metrics)");
}

TORCH_LIBRARY_IMPL(aepo_native, CPU, m) { m.impl("policy_terms", aepo::policy_terms_op); }
