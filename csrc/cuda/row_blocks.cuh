// The blocks that share a row: the softmax of a block's part of it, and the merge of all parts by the block that is
// done last.
#pragma once

#include <cuda_runtime.h>

#include "cuda_kernels.h"
#include "lane_softmax.h"

namespace aepo::cuda {

constexpr int kWarpSize = 32;
constexpr int kWarps = kThreads / kWarpSize;
constexpr unsigned kAllLanes = 0xffffffff;

__device__ __forceinline__ int64_t integer_at(const Integers& x, int64_t i) {
  return x.is_64_bit ? static_cast<const int64_t*>(x.data)[i] : static_cast<const int32_t*>(x.data)[i];
}

// Merge the states of a warp's lanes; lane 0 holds the result. Always the same pairs: equal inputs give equal bits.
__device__ __forceinline__ Softmax merge_warp(Softmax state, float scale) {
#pragma unroll
  for (int distance = kWarpSize / 2; distance > 0; distance /= 2) {
    const Softmax other = {__shfl_down_sync(kAllLanes, state.maximum, distance),
                           __shfl_down_sync(kAllLanes, state.rest, distance),
                           __shfl_down_sync(kAllLanes, state.weighted, distance)};
    state = merge(state, other, scale);
  }
  return state;
}

// The softmax of a part from the states of a block's lanes; every thread gets it.
template <class Logits>
__device__ __forceinline__ Softmax merge_lanes(const Lane& lane, const Part<Logits>& part, float scale) {
  __shared__ Softmax warps[kWarps];
  const int thread = threadIdx.x, warp = thread / kWarpSize;
  float maximum = lane.maximum;
#pragma unroll
  for (int distance = kWarpSize / 2; distance > 0; distance /= 2) {
    maximum = fmaxf(maximum, __shfl_xor_sync(kAllLanes, maximum, distance));
  }
  // One lane per warp reads its tile again, all warps at the same time, so that nobody waits for the block's maximum.
  const int holder = __ffs(__ballot_sync(kAllLanes, lane.maximum == maximum)) - 1;
  const Softmax mine = softmax_of(lane, part, thread, scale, thread % kWarpSize == holder);
  const Softmax state = merge_warp(mine, scale);
  if (thread % kWarpSize == 0) warps[warp] = state;
  __syncthreads();
  Softmax block = warps[0];
#pragma unroll
  for (int i = 1; i < kWarps; i++) block = merge(block, warps[i], scale);
  return block;
}

__device__ __forceinline__ float4* part_of_workspace(const Workspace& workspace, int row, int part, int parts) {
  return static_cast<float4*>(workspace.data) + static_cast<int64_t>(row) * parts + part;
}

// Called by warp 0 of each of the `parts` blocks of a row with its part's state, and a number to go with it, in lane 0.
// True in the block that comes last, whose lane 0 then holds the state of the row; visit(that number) was called for
// every part, by any lane. The parts are merged in the order of their numbers, whoever is last. The ticket counts 0, 1,
// .. parts - 1 and wraps to 0, so the workspace is ready for the next launch.
template <class Visit>
__device__ __forceinline__ bool merge_parts(Softmax& state, int number, const Workspace& workspace, int row, int part,
                                            int parts, float scale, const Visit& visit) {
  unsigned* const tickets = reinterpret_cast<unsigned*>(static_cast<float4*>(workspace.data) + workspace.blocks);
  const int lane = threadIdx.x;
  unsigned ticket = 0;
  if (lane == 0) {
    __stcg(part_of_workspace(workspace, row, part, parts),
           make_float4(state.maximum, state.rest, state.weighted, __int_as_float(number)));
    __threadfence();  // the part is visible before its ticket is drawn
    ticket = atomicInc(tickets + row, parts - 1);
  }
  if (__shfl_sync(kAllLanes, ticket, 0) != static_cast<unsigned>(parts) - 1) return false;
  __threadfence();  // and no part is read before the last ticket was, by any lane
  __syncwarp();
  state = Softmax();
  for (int i = lane; i < parts; i += kWarpSize) {
    const float4 other = __ldcg(part_of_workspace(workspace, row, i, parts));
    state = merge(state, {other.x, other.y, other.z}, scale);
    visit(__float_as_int(other.w));
  }
  state = merge_warp(state, scale);
  return true;
}

}  // namespace aepo::cuda
