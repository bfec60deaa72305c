// csrc/cuda/decode_entropy.cu as it is, called from Python (test_cuda_on_host.py).
#include "../../../csrc/cuda/decode_entropy.cu"

using namespace aepo;

extern "C" void decode_entropy_on_host(int type, const void* logits, int64_t rows, int64_t vocab, int64_t stride,
                                       const float* temperatures, float temperature, const void* slots,
                                       const void* tokens, bool is_64_bit, float* entropy, float* logprobs,
                                       int64_t num_slots, int64_t out_stride, void* workspace, int64_t blocks,
                                       unsigned order) {
  on_host::order_seed = order;
  cuda::DecodeEntropy call;
  call.type = static_cast<LogitsType>(type);
  call.logits = logits;
  call.rows = rows;
  call.vocab = vocab;
  call.row_stride = stride;
  call.temperatures = temperatures;
  call.temperature = temperature;
  call.slots = {slots, is_64_bit};
  call.tokens = {tokens, is_64_bit};
  call.entropy = entropy;
  call.logprobs = logprobs;
  call.num_slots = num_slots;
  call.entropy_stride = out_stride;
  call.logprobs_stride = out_stride;
  call.workspace = {workspace, blocks};
  if (cuda::launch_decode_entropy(call, nullptr) != nullptr) std::abort();
}

extern "C" void split_rows_on_host(bool is_float32, int64_t rows, int64_t vocab, int64_t blocks, int* parts,
                                   int* tiles_per_part) {
  using namespace cuda;
  const Split split = is_float32 ? split_rows(rows, vocab, kTile<Float32Logits>, Float32Logits::kVec, blocks)
                                 : split_rows(rows, vocab, kTile<BFloat16Logits>, BFloat16Logits::kVec, blocks);
  *parts = split.parts;
  *tiles_per_part = split.tiles_per_part;
}
