// The native sampler, on the CPU and, where nvcc built it, on CUDA.
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <cmath>
#include <limits>
#include <tuple>

#include "cuda_tensors.h"

namespace aepo {
namespace {

std::tuple<Tensor, Tensor, Tensor> sample_with_entropy(const Tensor& logits, const Tensor& temperature,
                                                       const OptionalTensor& top_k, const OptionalTensor& top_p,
                                                       const OptionalTensor& min_p, const Tensor& seed,
                                                       const Tensor& offset) {
  const Rows rows(logits, "logits");
  const double* temperature_of = data<double>(temperature, "temperature", rows.count);
  const int64_t* top_k_of = data<int64_t>(top_k, "top_k", rows.count);
  const double* top_p_of = data<double>(top_p, "top_p", rows.count);
  const double* min_p_of = data<double>(min_p, "min_p", rows.count);
  const int64_t* seed_of = data<int64_t>(seed, "seed", rows.count);
  const int64_t* offset_of = data<int64_t>(offset, "offset", rows.count);

  const Tensor tokens = at::empty({rows.count}, logits.options().dtype(at::kLong));
  const Tensor logprobs = at::empty({rows.count}, logits.options().dtype(rows.acc));
  const Tensor entropy = at::empty({rows.count}, logits.options().dtype(rows.acc));
  int64_t* to_tokens = tokens.data_ptr<int64_t>();
  const Column to_logprobs(logprobs, "logprobs", rows), to_entropy(entropy, "entropy", rows);
  // Whole rows: what a row needs after its first pass is still in its thread's cache.
  at::parallel_for(0, rows.count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; b++) {
      const SampleRow row = {temperature_of[b],
                             top_k_of == nullptr ? std::numeric_limits<int64_t>::max() : top_k_of[b],
                             top_p_of == nullptr ? 1 : top_p_of[b],
                             min_p_of == nullptr ? 0 : min_p_of[b],
                             static_cast<uint64_t>(seed_of[b]),
                             static_cast<uint64_t>(offset_of[b])};
      const SampledToken sampled = sample_row(rows.type, rows.at(b), rows.vocab, rows.element_bytes, row);
      to_tokens[b] = sampled.token;
      to_logprobs.set(b, sampled.logprob);
      to_entropy.set(b, sampled.entropy);
    }
  });
  return {tokens, logprobs, entropy};
}

#ifdef AEPO_CUDA
// `workspace` and `stream` as for decode_entropy_cuda.
void sample_with_entropy_cuda(const Tensor& logits, const Tensor& temperature, const OptionalTensor& top_k,
                              const OptionalTensor& top_p, const OptionalTensor& min_p, const Tensor& seed,
                              const Tensor& offset, const Tensor& tokens, const Tensor& logprobs,
                              const Tensor& entropy, const Tensor& workspace, int64_t stream) {
  auto call = cuda_call<cuda::SampleWithEntropy>(logits, workspace);
  call.temperature = data<double>(temperature, "temperature", call.rows, at::kCUDA);
  call.top_k = data<int64_t>(top_k, "top_k", call.rows, at::kCUDA);
  call.top_p = data<double>(top_p, "top_p", call.rows, at::kCUDA);
  call.min_p = data<double>(min_p, "min_p", call.rows, at::kCUDA);
  call.seed = data<int64_t>(seed, "seed", call.rows, at::kCUDA);
  call.offset = data<int64_t>(offset, "offset", call.rows, at::kCUDA);
  call.tokens = data<int64_t>(tokens, "tokens", call.rows, at::kCUDA);
  call.logprobs = data<float>(logprobs, "logprobs", call.rows, at::kCUDA);
  call.entropy = data<float>(entropy, "entropy", call.rows, at::kCUDA);
  const char* const error = cuda::launch_sample_with_entropy(call, reinterpret_cast<void*>(stream));
  TORCH_CHECK(error == nullptr, "sample_with_entropy could not be launched: ", error);
}
#endif

}  // namespace
}  // namespace aepo

TORCH_LIBRARY_FRAGMENT(aepo_native, m) {
  m.def(
      "sample_with_entropy(Tensor logits, Tensor temperature, Tensor? top_k, Tensor? top_p, Tensor? min_p,"
      " Tensor seed, Tensor offset) -> (Tensor tokens, Tensor logprobs, Tensor entropy)");
  m.def(
      "sample_with_entropy_cuda(Tensor logits, Tensor temperature, Tensor? top_k, Tensor? top_p, Tensor? min_p,"
      " Tensor seed, Tensor offset, Tensor(a!) tokens, Tensor(b!) logprobs, Tensor(c!) entropy, Tensor(d!) workspace,"
      " int stream) -> ()");
}

TORCH_LIBRARY_IMPL(aepo_native, CPU, m) { m.impl("sample_with_entropy", aepo::sample_with_entropy); }

#ifdef AEPO_CUDA
TORCH_LIBRARY_IMPL(aepo_native, CUDA, m) { m.impl("sample_with_entropy_cuda", aepo::sample_with_entropy_cuda); }
#endif
