// The native operations on rows of logits: torch.ops.aepo_native.*, called by aepo_kernels.ops after its checks. The
// bindings check what memory safety needs, split the work over threads and know torch; the kernels know none of it.
#include <Python.h>

#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <string>
#include <tuple>
#include <vector>

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
        logprob = row_logprob(rows, t, label_column(label[t], vocab_start, rows.vocab), stats, temperature);
      }
      to_logprobs.set(t, logprob);
    }
  });
  return {logprobs, entropy, maximum, log_sum};
}

void logits_grad(const Tensor& logits, const OptionalTensor& labels, const Tensor& maximum, const Tensor& log_sum,
                 const Tensor& entropy, const OptionalTensor& grad_logprobs, const OptionalTensor& grad_entropy,
                 double temperature, int64_t ignore_index, const Tensor& out, int64_t vocab_start) {
  const Rows rows(logits, "logits"), grads = grads_like(rows, logits, out);
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
  for_each_segment(zero.size(), rows.vocab,
                   [&](int64_t i, int64_t column, int64_t n) { zero_segment(grads, zero[i], column, n); });
  for_each_segment(used.size(), rows.vocab, [&](int64_t i, int64_t column, int64_t n) {
    const int64_t t = used[i];
    const RowStats stats = {max_of[t], log_sum_of[t], entropy_of[t]};
    const int64_t at = label == nullptr ? -1 : label_column(label[t], vocab_start, rows.vocab);
    segment_grad(rows, grads, t, column, n, at, stats, grad_logprob(t), grad_h(t), temperature,
                 row_kernels().logits_grad[rows.type]);
  });
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
}

TORCH_LIBRARY_IMPL(aepo_native, CPU, m) {
  m.impl("token_stats", aepo::token_stats);
  m.impl("logits_grad", aepo::logits_grad);
}

// An empty module, so that `import aepo_kernels._C` loads this library and runs the registrations above.
PyMODINIT_FUNC PyInit__C() {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, 0, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
