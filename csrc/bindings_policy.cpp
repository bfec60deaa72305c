// The native operations that know the objective: the O(T) loss, and with it a whole loss in one visit to each row.
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <memory>
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

// With one ratio per token.
template <class Real>
PolicyInputs<Real> policy_inputs(const Tensor& logprobs, const Tensor& old_logprobs, const Tensor& advantages,
                                 const Tensor& weight, const OptionalTensor& counts, const OptionalTensor& entropy,
                                 const OptionalTensor& ref_logprobs, const OptionalTensor& rollout_logprobs,
                                 const OptionalTensor& entropy_stats) {
  const int64_t n = logprobs.numel();
  PolicyInputs<Real> in = {};
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
  return in;
}

template <class Real>
std::tuple<Tensor, Tensor, Tensor, Tensor> policy_terms_of(
    const Tensor& logprobs, const Tensor& old_logprobs, const Tensor& advantages, const Tensor& weight,
    const OptionalTensor& counts, const OptionalTensor& entropy, const OptionalTensor& ref_logprobs,
    const OptionalTensor& rollout_logprobs, const OptionalTensor& cu_seqlens, const OptionalTensor& entropy_stats,
    at::ArrayRef<double> numbers) {
  const int64_t n = logprobs.numel(), num_sequences = cu_seqlens.has_value() ? cu_seqlens->numel() - 1 : 0;
  const ObjectiveNumbers objective = objective_numbers_of(numbers);
  PolicyInputs<Real> in = policy_inputs<Real>(logprobs, old_logprobs, advantages, weight, counts, entropy,
                                              ref_logprobs, rollout_logprobs, entropy_stats);
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

// What the statistics of some rows keep for their gradients.
template <class Real>
class KeptRows {
 public:
  KeptRows(int64_t rows, int64_t vocab)
      : segments_(num_segments(vocab)),
        partial_(rows * segments_),
        values_(new Real[rows * segments_ * (kSegment + kKeptMaxima)]) {}  // not a vector: nothing need be 0

  Kept segment(int64_t row, int64_t column) const {
    Real* const at = values_.get() + (row * segments_ + column / kSegment) * (kSegment + kKeptMaxima);
    return {at, at + kSegment};
  }
  SegmentStats& stats(int64_t row, int64_t column) { return partial_[row * segments_ + column / kSegment]; }
  RowStats merged(int64_t row, double temperature) const {
    return merge_segments(partial_.data() + row * segments_, segments_, temperature);
  }

 private:
  const int64_t segments_;
  std::vector<SegmentStats> partial_;
  std::unique_ptr<Real[]> values_;
};

// Every row in one visit: statistics, the rule for its token, and the gradient while row and exponentials are in the
// thread's cache.
template <class Real>
class SinglePass {
 public:
  SinglePass(const Rows& rows, const Rows& grads, const int64_t* label, double temperature,
             const ObjectiveNumbers& numbers, const PolicyInputs<Real>& in, Real* logprobs, Real* entropy)
      : rows_(rows), grads_(grads), label_(label), temperature_(temperature), numbers_(numbers), in_(in),
        logprobs_(logprobs), entropy_(entropy) {}

  // As many whole rows for every thread as there are; what is left, fewer rows than threads, is spread by segments. Both
  // give the same bits.
  void run(const std::vector<int64_t>& used) const {
    const int64_t count = used.size(), whole = count - count % at::get_num_threads(), vocab = rows_.vocab;
    const int64_t grain = std::max<int64_t>(1, kSegment / std::max<int64_t>(1, vocab));
    at::parallel_for(0, whole, grain, [&](int64_t begin, int64_t end) {
      KeptRows<Real> kept(1, vocab);
      for (int64_t i = begin; i < end; i++) {
        for (int64_t c = 0; c < vocab; c += kSegment) add(kept, 0, used[i], c, std::min(kSegment, vocab - c));
        const Coefficients row = rule(used[i], kept.merged(0, temperature_));
        for (int64_t c = 0; c < vocab; c += kSegment) write(kept, 0, used[i], c, std::min(kSegment, vocab - c), row);
      }
    });
    const int64_t* rest = used.data() + whole;
    KeptRows<Real> kept(count - whole, vocab);
    std::vector<Coefficients> rows(count - whole);
    for_each_segment(count - whole, vocab, [&](int64_t i, int64_t c, int64_t n) { add(kept, i, rest[i], c, n); });
    for (int64_t i = 0; i < count - whole; i++) rows[i] = rule(rest[i], kept.merged(i, temperature_));
    for_each_segment(count - whole, vocab,
                     [&](int64_t i, int64_t c, int64_t n) { write(kept, i, rest[i], c, n, rows[i]); });
  }

 private:
  // What the gradient of a row needs, rounded to Real where the stages hand it on as tensors.
  struct Coefficients {
    RowStats stats;
    double logprob, entropy;
  };

  void add(KeptRows<Real>& kept, int64_t i, int64_t t, int64_t column, int64_t n) const {
    kept.stats(i, column) = row_kernels().kept_stats[rows_.type](rows_.at(t, column), n, log2_scale(temperature_),
                                                                 kept.segment(i, column));
  }

  Coefficients rule(int64_t t, const RowStats& stats) const {
    logprobs_[t] = static_cast<Real>(row_logprob(rows_, t, column_of(t), stats, temperature_));
    entropy_[t] = static_cast<Real>(stats.entropy);
    const TokenGrads<Real> grads = token_grads(numbers_, in_, t);
    return {{stats.max, static_cast<Real>(stats.log_sum), entropy_[t]}, grads.logprob, grads.entropy};
  }

  void write(const KeptRows<Real>& kept, int64_t i, int64_t t, int64_t column, int64_t n,
             const Coefficients& row) const {
    if (row.logprob == 0 && row.entropy == 0) return zero_segment(grads_, t, column, n);
    segment_grad(rows_, grads_, t, column, n, column_of(t), row.stats, row.logprob, row.entropy, temperature_,
                 [&](const void* x, void* out, int64_t num, const RowGrad& grad) {
                   row_kernels().kept_grad[rows_.type](x, out, num, grad, kept.segment(i, column));
                 });
  }

  int64_t column_of(int64_t t) const { return label_column(label_[t], 0, rows_.vocab); }

  const Rows &rows_, &grads_;
  const int64_t* label_;
  const double temperature_;
  const ObjectiveNumbers& numbers_;
  const PolicyInputs<Real>& in_;  // its log-probs and entropies are those that are made here
  Real *logprobs_, *entropy_;
};

template <class Real>
std::tuple<Tensor, Tensor> single_pass_of(const Tensor& logits, const Tensor& labels, double temperature,
                                          int64_t ignore_index, const Tensor& old_logprobs, const Tensor& advantages,
                                          const Tensor& weight, const OptionalTensor& counts,
                                          const OptionalTensor& ref_logprobs, const OptionalTensor& rollout_logprobs,
                                          const OptionalTensor& entropy_stats, at::ArrayRef<double> numbers,
                                          const Tensor& out) {
  const Rows rows(logits, "logits"), grads = grads_like(rows, logits, out);
  const int64_t* label = data<int64_t>(labels, "labels", rows.count);
  const ObjectiveNumbers objective = objective_numbers_of(numbers);
  TORCH_CHECK_VALUE(entropy_stats.has_value() || objective.entropy_advantage == 0,
                    "entropy_advantage needs entropy_stats: those of all rows are not known at the first");
  const auto options = logits.options().dtype(rows.acc);
  const Tensor logprobs = at::zeros({rows.count}, options), entropy = at::zeros({rows.count}, options);
  const PolicyInputs<Real> in = policy_inputs<Real>(logprobs, old_logprobs, advantages, weight, counts, entropy,
                                                    ref_logprobs, rollout_logprobs, entropy_stats);
  std::vector<int64_t> used, ignored;
  for (int64_t t = 0; t < rows.count; t++) (label[t] != ignore_index ? used : ignored).push_back(t);
  for_each_segment(ignored.size(), rows.vocab,
                   [&](int64_t i, int64_t column, int64_t n) { zero_segment(grads, ignored[i], column, n); });
  SinglePass<Real>(rows, grads, label, temperature, objective, in, logprobs.data_ptr<Real>(), entropy.data_ptr<Real>())
      .run(used);
  return {logprobs, entropy};
}

std::tuple<Tensor, Tensor> single_pass_op(const Tensor& logits, const Tensor& labels, double temperature,
                                          int64_t ignore_index, const Tensor& old_logprobs, const Tensor& advantages,
                                          const Tensor& weight, const OptionalTensor& counts,
                                          const OptionalTensor& ref_logprobs, const OptionalTensor& rollout_logprobs,
                                          const OptionalTensor& entropy_stats, at::ArrayRef<double> numbers,
                                          Tensor out) {
  const auto run = logits.scalar_type() == at::kDouble ? single_pass_of<double> : single_pass_of<float>;
  return run(logits, labels, temperature, ignore_index, old_logprobs, advantages, weight, counts, ref_logprobs,
             rollout_logprobs, entropy_stats, numbers, out);
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
  m.def(
      "single_pass(Tensor logits, Tensor labels, float temperature, int ignore_index, Tensor old_logprobs,"
      " Tensor advantages, Tensor weight, Tensor? counts, Tensor? ref_logprobs, Tensor? rollout_logprobs,"
      " Tensor? entropy_stats, float[] numbers, Tensor(a!) out) -> (Tensor logprobs, Tensor entropy)");
}

TORCH_LIBRARY_IMPL(aepo_native, CPU, m) {
  m.impl("policy_terms", aepo::policy_terms_op);
  m.impl("single_pass", aepo::single_pass_op);
}
