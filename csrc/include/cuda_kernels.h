// The CUDA kernels as the bindings see them: pointers on the device, sizes, a stream; neither torch nor CUDA headers.
#pragma once

#include <cstdint>

#include "row_kernels.h"

namespace aepo::cuda {

// Why the kernels cannot run on the current device (no driver, one that is too old, code for other GPUs), or null.
const char* problem_of_current_device();

// Tensor of 32- or 64-bit integers on the device; no data: absent.
struct Integers {
  const void* data = nullptr;
  bool is_64_bit = false;
};

// Memory that the blocks of split rows merge through: 16 bytes and a ticket per block. Tickets are 0 between launches:
// zeroed once by the owner, and left 0 by every launch. Two launches that may overlap must not share a workspace.
struct Workspace {
  static constexpr int kBytesPerBlock = 20;
  void* data = nullptr;
  int64_t blocks = 0;  // a row is split over several blocks only while all blocks of a call fit
};

// The entropy, and the log-prob of one token, of every row of logits [rows, vocab] whose slot is in [0, num_slots).
struct DecodeEntropy {
  LogitsType type = kFloat32;
  const void* logits = nullptr;
  int64_t rows = 0, vocab = 0, row_stride = 0;  // in logits
  const float* temperatures = nullptr;          // [rows], or null: `temperature` for all
  float temperature = 1;
  Integers slots;   // [rows], or absent: the row's number
  Integers tokens;  // [rows], or absent: no log-probs
  float* entropy = nullptr;  // [num_slots] at `entropy_stride`
  float* logprobs = nullptr;
  int64_t num_slots = 0, entropy_stride = 1, logprobs_stride = 1;
  Workspace workspace;
};

// One launch, nothing waited for. Returns null, or what is wrong.
const char* launch_decode_entropy(const DecodeEntropy& call, void* stream);

// A token from every row of logits [rows, vocab], its log-prob, and the row's entropy. All pointers are to [rows].
struct SampleWithEntropy {
  LogitsType type = kFloat32;
  const void* logits = nullptr;
  int64_t rows = 0, vocab = 0, row_stride = 0;  // in logits
  const double* temperature = nullptr;          // 0: the most likely token, and statistics at temperature 1
  const int64_t* top_k = nullptr;               // null: no such filter, as below
  const double *top_p = nullptr, *min_p = nullptr;
  const int64_t *seed = nullptr, *offset = nullptr;
  int64_t* tokens = nullptr;
  float *logprobs = nullptr, *entropy = nullptr;
  Workspace workspace;
};

const char* launch_sample_with_entropy(const SampleWithEntropy& call, void* stream);

}  // namespace aepo::cuda
