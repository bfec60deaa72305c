// Entropy of every row of the logits at decode time, and the log-prob of its token, in one launch and one read.
//
// Nothing here waits for the host or allocates: a call is one kernel node in a CUDA graph. A row that nobody wants (its
// slot is negative) is not read.
#include "row_blocks.cuh"
#include "row_launch.cuh"

namespace aepo::cuda {
namespace {

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
  const auto mine = part_of_row<Logits>(x, vocab, part, split.tiles_per_part);
  Lane lane(mine.first);
  for_each_tile(mine, threadIdx.x, [&](const auto& logits, int tile) { absorb(lane, logits, tile, scale); });
  Softmax state = merge_lanes(lane, mine, scale);
  if (threadIdx.x >= kWarpSize) return;
  const auto nothing = [](int) {};
  if (split.parts > 1 && !merge_parts(state, 0, call.workspace, row, part, split.parts, scale, nothing)) return;
  if (threadIdx.x > 0) return;
  const RowResult result = finish(state);
  call.entropy[slot * call.entropy_stride] = result.entropy;
  if (call.tokens.data != nullptr) {
    call.logprobs[slot * call.logprobs_stride] = (token_logit - state.maximum) * inverse - result.log_sum;
  }
}

}  // namespace

const char* problem_of_current_device() {
  cudaFuncAttributes attributes;
  const cudaError_t error = cudaFuncGetAttributes(&attributes, decode_entropy_kernel<Float32Logits>);
  cudaGetLastError();  // answered here, and no later launch shall find it
  return text_of(error);
}

const char* launch_decode_entropy(const DecodeEntropy& call, void* stream) {
  return launch_rows(call, stream, [](auto logits) { return decode_entropy_kernel<decltype(logits)>; });
}

}  // namespace aepo::cuda
