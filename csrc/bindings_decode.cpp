// The native operations of decode time, on the CPU and, where nvcc built them, on CUDA. They write into tensors that
// exist already, by slot: out[slots[b]] belongs to row b, and a row whose slot is not in [0, N) is not read.
#include <torch/library.h>

#include <cmath>
#include <string>
#include <vector>

#include "cuda_tensors.h"

namespace aepo {
namespace {

// One number per slot, [N] at any stride, in the accumulation dtype.
struct SlotColumn {
  SlotColumn(const Tensor& x, const char* name, const Rows& rows, at::DeviceType device) {
    TORCH_CHECK_VALUE(x.device().type() == device && x.scalar_type() == rows.acc && x.dim() == 1, name,
                      " must be 1-D ", rows.acc, " on ", device, "; got ", x.scalar_type(), " ", x.sizes(), " on ",
                      x.device());
    data = x.data_ptr();
    count = x.size(0);
    stride = x.stride(0);
    float64 = rows.acc == at::kDouble;
  }

  void set(int64_t slot, double value) const {
    if (float64) {
      static_cast<double*>(data)[slot * stride] = value;
    } else {
      static_cast<float*>(data)[slot * stride] = static_cast<float>(value);
    }
  }

  void* data;
  int64_t count, stride;
  bool float64;
};

void check_outputs(const OptionalTensor& tokens, const Tensor& entropy, const OptionalTensor& logprobs) {
  TORCH_CHECK_VALUE(tokens.has_value() == logprobs.has_value(), "tokens and logprobs come together");
  TORCH_CHECK_VALUE(!logprobs.has_value() || logprobs->sizes() == entropy.sizes(), "logprobs must have the shape ",
                    entropy.sizes(), " of entropy; got ", logprobs->sizes());
}

void decode_entropy(const Tensor& logits, const OptionalTensor& temperatures, double temperature,
                    const OptionalTensor& slots, const OptionalTensor& tokens, const Tensor& entropy,
                    const OptionalTensor& logprobs) {
  const Rows rows(logits, "logits");
  const Column temperature_of(temperatures, "temperatures", rows);
  const int64_t* slot = data<int64_t>(slots, "slots", rows.count);
  const int64_t* token = data<int64_t>(tokens, "tokens", rows.count);
  check_outputs(tokens, entropy, logprobs);
  const SlotColumn to_entropy(entropy, "entropy", rows, at::kCPU);
  const SlotColumn to_logprobs(logprobs.value_or(entropy), "logprobs", rows, at::kCPU);

  struct Wanted {
    int64_t row, slot;
    double temperature;
  };
  std::vector<Wanted> wanted;
  for (int64_t b = 0; b < rows.count; b++) {
    const int64_t s = slot == nullptr ? b : slot[b];
    if (s < 0 || s >= to_entropy.count) continue;
    wanted.push_back({b, s, temperature_of.given() ? temperature_of[b] : temperature});
  }

  const auto kernel = row_kernels().token_stats[rows.type];
  const int64_t segments = num_segments(rows.vocab);
  std::vector<SegmentStats> partial(wanted.size() * segments);
  for_each_segment(wanted.size(), rows.vocab, [&](int64_t i, int64_t column, int64_t n) {
    partial[i * segments + column / kSegment] =
        kernel(rows.at(wanted[i].row, column), n, log2_scale(wanted[i].temperature));
  });
  for (size_t i = 0; i < wanted.size(); i++) {
    const auto [row, s, row_temperature] = wanted[i];
    const RowStats stats = merge_segments(partial.data() + i * segments, segments, row_temperature);
    to_entropy.set(s, stats.entropy);
    if (token == nullptr) continue;
    // A token out of range must not be read. The operation above this one raises for it on the CPU.
    const bool in_range = token[row] >= 0 && token[row] < rows.vocab;
    const double logit = in_range ? load_logit(rows.type, rows.at(row), token[row]) : std::nan("");
    to_logprobs.set(s, label_logprob(logit, stats, row_temperature));
  }
}

#ifdef AEPO_CUDA
std::string cuda_targets() { return AEPO_CUDA; }

std::string cuda_problem() {
  const char* const problem = cuda::problem_of_current_device();
  return problem == nullptr ? "" : problem;
}

cuda::Integers integers(const OptionalTensor& x, const char* name, int64_t count) {
  if (!x.has_value()) return {};
  const bool is_64_bit = x->scalar_type() == at::kLong;
  if (is_64_bit) return {data<int64_t>(x, name, count, at::kCUDA), true};
  return {data<int32_t>(x, name, count, at::kCUDA), false};
}

// `stream` is the handle of the current CUDA stream as an integer, and its device the current one: asked for in Python,
// they cost this file no CUDA header, which a CPU build of torch does not have in full.
void decode_entropy_cuda(const Tensor& logits, const OptionalTensor& temperatures, double temperature,
                         const OptionalTensor& slots, const OptionalTensor& tokens, const Tensor& entropy,
                         const OptionalTensor& logprobs, const Tensor& workspace, int64_t stream) {
  auto call = cuda_call<cuda::DecodeEntropy>(logits, workspace);
  const Rows rows(logits, "logits", at::kCUDA);
  check_outputs(tokens, entropy, logprobs);
  const SlotColumn to_entropy(entropy, "entropy", rows, at::kCUDA);
  const SlotColumn to_logprobs(logprobs.value_or(entropy), "logprobs", rows, at::kCUDA);
  call.temperatures = data<float>(temperatures, "temperatures", rows.count, at::kCUDA);
  call.temperature = static_cast<float>(temperature);
  call.slots = integers(slots, "slots", rows.count);
  call.tokens = integers(tokens, "tokens", rows.count);
  call.entropy = static_cast<float*>(to_entropy.data);
  call.logprobs = static_cast<float*>(to_logprobs.data);
  call.num_slots = to_entropy.count;
  call.entropy_stride = to_entropy.stride;
  call.logprobs_stride = to_logprobs.stride;
  const char* const error = cuda::launch_decode_entropy(call, reinterpret_cast<void*>(stream));
  TORCH_CHECK(error == nullptr, "decode_entropy could not be launched: ", error);
}
#else
std::string cuda_targets() { return ""; }

std::string cuda_problem() { return "built without CUDA code"; }
#endif

}  // namespace
}  // namespace aepo

TORCH_LIBRARY_FRAGMENT(aepo_native, m) {
  m.def("cuda_targets() -> str", aepo::cuda_targets);  // the GPUs there is machine code for, "" in a build without
  m.def("cuda_problem() -> str", aepo::cuda_problem);  // why it does not run on the current CUDA device, "" if it does
  m.def(
      "decode_entropy(Tensor logits, Tensor? temperatures, float temperature, Tensor? slots, Tensor? tokens,"
      " Tensor(a!) entropy, Tensor(b!)? logprobs) -> ()");
  m.def(
      "decode_entropy_cuda(Tensor logits, Tensor? temperatures, float temperature, Tensor? slots, Tensor? tokens,"
      " Tensor(a!) entropy, Tensor(b!)? logprobs, Tensor(c!) workspace, int stream) -> ()");
}

TORCH_LIBRARY_IMPL(aepo_native, CPU, m) { m.impl("decode_entropy", aepo::decode_entropy); }

#ifdef AEPO_CUDA
TORCH_LIBRARY_IMPL(aepo_native, CUDA, m) { m.impl("decode_entropy_cuda", aepo::decode_entropy_cuda); }
#endif
