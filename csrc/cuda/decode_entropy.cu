// Entropy of every row of the logits at decode time, and the log-prob of its token, in one launch and one read.
//
// Nothing here waits for the host or allocates: a call is one kernel node in a CUDA graph. A row that nobody wants (its
// slot is negative) is not read.
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "cuda_kernels.h"
#include "lane_softmax.h"
#include "row_blocks.cuh"

namespace aepo::cuda {
namespace {

struct Float16Logits {
  using Element = __half;
  static constexpr int kVec = 8;
  static __device__ __forceinline__ float value(__half x) { return __half2float(x); }
  static __device__ __forceinline__ void unpack(const Word& word, float* x) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const float2 pair = __half22float2(reinterpret_cast<const __half2&>(word.bits[i]));
      x[2 * i] = pair.x;
      x[2 * i + 1] = pair.y;
    }
  }
};

template <class Logits>
__global__ void __launch_bounds__(kThreads, kBlocksPerProcessor)
    decode_entropy_kernel(const __grid_constant__ DecodeEntropy call, const Split split) {
  const int row = blockIdx.x / split.parts, part = blockIdx.x % split.parts;
  const int64_t slot = call.slots.data != nullptr ? integer_at(call.slots, row) : row;
  if (slot < 0 || slot >= call.num_slots) return;

  const auto* const x = static_cast<const typename Logits::Element*>(call.logits) + row * call.row_stride;
  const float inverse = inverse_temperature(call.temperatures != nullptr ? call.temperatures[row] : call.temperature);
  const float scale = log2_scale(inverse);
  float token_logit = NAN;
  if (call.tokens.data != nullptr && threadIdx.x == 0) {  // asked for now, it has come long before it is needed
    const int64_t token = integer_at(call.tokens, row);
    if (token >= 0 && token < call.vocab) token_logit = Logits::value(x[token]);
  }

  const int vocab = static_cast<int>(call.vocab);
  Softmax state = block_softmax(part_of_row<Logits>(x, vocab, part, split.tiles_per_part), scale);
  if (threadIdx.x >= kWarpSize) return;
  if (split.parts > 1 && !merge_parts(state, call.workspace, row, part, split.parts, scale)) return;
  if (threadIdx.x > 0) return;
  const RowResult result = finish(state);
  call.entropy[slot * call.entropy_stride] = result.entropy;
  if (call.tokens.data != nullptr) {
    call.logprobs[slot * call.logprobs_stride] = (token_logit - state.maximum) * inverse - result.log_sum;
  }
}

const char* text_of(cudaError_t error) { return error == cudaSuccess ? nullptr : cudaGetErrorString(error); }

template <class Logits>
const char* launch(const DecodeEntropy& call, void* stream) {
  const Split split = split_rows(call.rows, call.vocab, kTile<Logits>, Logits::kVec, call.workspace.blocks);
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(call.rows * split.parts));
  config.blockDim = dim3(kThreads);
  config.stream = static_cast<cudaStream_t>(stream);
  return text_of(cudaLaunchKernelEx(&config, decode_entropy_kernel<Logits>, call, split));
}

}  // namespace

const char* problem_of_current_device() {
  cudaFuncAttributes attributes;
  const cudaError_t error = cudaFuncGetAttributes(&attributes, decode_entropy_kernel<Float32Logits>);
  cudaGetLastError();  // answered here, and no later launch shall find it
  return text_of(error);
}

const char* launch_decode_entropy(const DecodeEntropy& call, void* stream) {
  if (call.rows == 0) return nullptr;
  switch (call.type) {
    case kBFloat16:
      return launch<BFloat16Logits>(call, stream);
    case kFloat16:
      return launch<Float16Logits>(call, stream);
    case kFloat32:
      return launch<Float32Logits>(call, stream);
    default:
      return "there is no kernel for float64 logits";
  }
}

}  // namespace aepo::cuda
