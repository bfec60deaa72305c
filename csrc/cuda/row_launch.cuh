// The launch of a kernel over rows of logits, for each storage type that there is.
#pragma once

#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "cuda_kernels.h"
#include "lane_softmax.h"

namespace aepo::cuda {

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

inline const char* text_of(cudaError_t error) { return error == cudaSuccess ? nullptr : cudaGetErrorString(error); }

template <class Logits, class Call>
const char* launch(void (*kernel)(Call, Split), const Call& call, void* stream) {
  const Split split = split_rows(call.rows, call.vocab, kTile<Logits>, Logits::kVec, call.workspace.blocks);
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(call.rows * split.parts));
  config.blockDim = dim3(kThreads);
  config.stream = static_cast<cudaStream_t>(stream);
  return text_of(cudaLaunchKernelEx(&config, kernel, call, split));
}

// Launch the kernel that kernel_of(Logits()) names for the call's storage type. Returns null, or what is wrong.
template <class Call, class KernelOf>
const char* launch_rows(const Call& call, void* stream, const KernelOf& kernel_of) {
  if (call.rows == 0) return nullptr;
  switch (call.type) {
    case kBFloat16:
      return launch<BFloat16Logits, Call>(kernel_of(BFloat16Logits()), call, stream);
    case kFloat16:
      return launch<Float16Logits, Call>(kernel_of(Float16Logits()), call, stream);
    case kFloat32:
      return launch<Float32Logits, Call>(kernel_of(Float32Logits()), call, stream);
    default:
      return "there is no kernel for float64 logits";
  }
}

}  // namespace aepo::cuda
