// As much of CUDA as csrc/cuda/ uses, on the host, for tests where there is no GPU: its sources compile as C++ against
// this header in the place of CUDA's own. The threads of a block are fibers that take turns, the exchanges between them
// are where the turn passes on, and the blocks of a launch run one after another in an order drawn from a seed.
//
// What it cannot show: blocks that run at the same time, and anything about memory order.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define __shared__ static  // one block at a time

struct dim3 {
  unsigned x;
  dim3(unsigned x = 1) : x(x) {}
};
inline dim3 threadIdx, blockIdx;

namespace on_host {

constexpr int kWarp = 32, kMaxThreads = 1024, kStack = 1 << 16;

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStack]};
  bool done;
};
inline std::vector<Fiber> fibers(kMaxThreads);
inline ucontext_t scheduler;
inline int num_threads;
inline int64_t progress;  // counts released barriers and finished fibers
inline std::function<void()> body;
inline unsigned order_seed;

inline void pass_on() { swapcontext(&fibers[threadIdx.x].context, &scheduler); }

struct Barrier {
  int arrived = 0;
  int64_t generation = 0;
  void wait(int count) {
    const int64_t mine = generation;
    if (++arrived == count) {
      arrived = 0;
      generation++;
      progress++;
    } else {
      while (generation == mine) pass_on();
    }
  }
};
inline Barrier block_barrier, warp_barriers[kMaxThreads / kWarp];

inline void sync_warp() { warp_barriers[threadIdx.x / kWarp].wait(kWarp); }

// Everybody's value, where everybody sees it; `read` gets the 32 values of this thread's warp.
template <class T, class Read>
auto exchange(T value, const Read& read) {
  static T values[kMaxThreads];
  values[threadIdx.x] = value;
  sync_warp();
  const auto result = read(values + threadIdx.x / kWarp * kWarp);
  sync_warp();
  return result;
}

inline void fiber_main() {
  body();
  fibers[threadIdx.x].done = true;
  progress++;
  pass_on();
}

inline void run_block() {
  for (int i = 0; i < num_threads; i++) {
    Fiber& fiber = fibers[i];
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStack;
    fiber.done = false;
    makecontext(&fiber.context, fiber_main, 0);
  }
  for (int left = num_threads; left > 0;) {
    const int64_t before = progress;
    left = 0;
    for (int i = 0; i < num_threads; i++) {
      if (fibers[i].done) continue;
      threadIdx.x = i;
      swapcontext(&scheduler, &fibers[i].context);
      left += !fibers[i].done;
    }
    if (left > 0 && progress == before) {
      std::fprintf(stderr, "block %u: %d threads wait for others for ever\n", blockIdx.x, left);
      std::abort();
    }
  }
}

}  // namespace on_host

inline void __syncthreads() { on_host::block_barrier.wait(on_host::num_threads); }
inline void __syncwarp() { on_host::sync_warp(); }
inline void __threadfence() {}

template <class T>
T __shfl_sync(unsigned, T value, int from) {
  return on_host::exchange(value, [&](const T* warp) { return warp[from]; });
}
template <class T>
T __shfl_down_sync(unsigned, T value, int distance) {
  const int lane = threadIdx.x % on_host::kWarp, from = lane + distance;
  return on_host::exchange(value, [&](const T* warp) { return warp[from < on_host::kWarp ? from : lane]; });
}
template <class T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  return on_host::exchange(value, [&](const T* warp) { return warp[threadIdx.x % on_host::kWarp ^ mask]; });
}
inline unsigned __ballot_sync(unsigned, bool vote) {
  return on_host::exchange(vote, [](const bool* warp) {
    unsigned votes = 0;
    for (int i = 0; i < on_host::kWarp; i++) votes |= static_cast<unsigned>(warp[i]) << i;
    return votes;
  });
}
inline bool __any_sync(unsigned lanes, bool vote) { return __ballot_sync(lanes, vote) != 0; }
inline int __ffs(unsigned x) { return __builtin_ffs(static_cast<int>(x)); }

struct alignas(16) float4 {
  float x, y, z, w;
};
struct float2 {
  float x, y;
};
inline float __int_as_float(int bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
inline int __float_as_int(float value) {
  int bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
template <class T>
void __stcg(T* to, const T& value) {
  *to = value;
}
template <class T>
T __ldcg(const T* from) {
  return *from;
}
inline unsigned atomicInc(unsigned* counter, unsigned last) {
  const unsigned old = *counter;
  *counter = old >= last ? 0 : old + 1;
  return old;
}

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess };
inline const char* cudaGetErrorString(cudaError_t) { return "no error"; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
struct cudaFuncAttributes {};
template <class Kernel>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, Kernel) {
  return cudaSuccess;
}

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
};

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...), Arguments&&... arguments) {
  on_host::num_threads = config->blockDim.x;
  on_host::body = [&] { kernel(arguments...); };
  std::vector<unsigned> blocks(config->gridDim.x);
  std::iota(blocks.begin(), blocks.end(), 0);
  std::shuffle(blocks.begin(), blocks.end(), std::mt19937(on_host::order_seed));
  for (unsigned block : blocks) {
    blockIdx.x = block;
    on_host::run_block();
  }
  return cudaSuccess;
}
