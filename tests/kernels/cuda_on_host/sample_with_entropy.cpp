// csrc/cuda/sample_with_entropy.cu as it is, called from Python (test_sample_cuda_on_host.py).
#include "../../../csrc/cuda/sample_with_entropy.cu"

using namespace aepo;

extern "C" void sample_with_entropy_on_host(int type, const void* logits, int64_t rows, int64_t vocab, int64_t stride,
                                            const double* temperature, const int64_t* top_k, const double* top_p,
                                            const double* min_p, const int64_t* seed, const int64_t* offset,
                                            int64_t* tokens, float* logprobs, float* entropy, void* workspace,
                                            int64_t blocks, unsigned order) {
  on_host::order_seed = order;
  cuda::SampleWithEntropy call;
  call.type = static_cast<LogitsType>(type);
  call.logits = logits;
  call.rows = rows;
  call.vocab = vocab;
  call.row_stride = stride;
  call.temperature = temperature;
  call.top_k = top_k;
  call.top_p = top_p;
  call.min_p = min_p;
  call.seed = seed;
  call.offset = offset;
  call.tokens = tokens;
  call.logprobs = logprobs;
  call.entropy = entropy;
  call.workspace = {workspace, blocks};
  if (cuda::launch_sample_with_entropy(call, nullptr) != nullptr) std::abort();
}

extern "C" void random_words_on_host(int64_t seed, int64_t offset, int first, uint32_t* words, float* noise,
                                     float* most) {
  const cuda::RandomRow row(seed, offset);
  cuda::random_words(row, first, words);
  for (int i = 0; i < 4; i++) {
    noise[i] = cuda::noise_of(words[i]);
    most[i] = cuda::most_noise(words[i]);
  }
}
