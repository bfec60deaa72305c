// Draw one token from a row of logits: argmax over the tokens that the filters keep of z_i + g_i, z = x / temperature.
// The Gumbel noise g_i is a function of (seed, offset, token) alone, so the argmax does not depend on how it is looked
// for. The specification is aepo_kernels/reference/sample_with_entropy.py. Torch-free, like row_kernels.h.
#pragma once

#include <cstdint>

namespace aepo {

// What a draw needs to know about its row.
struct DrawRow {
  double max;          // of x, finite
  double pivot;        // only tokens with x > pivot
  double temperature;  // > 0
  bool greedy;         // no noise: the first of the largest logits
  uint64_t seed;
  uint64_t offset;
};

// The best token so far, by score = (x - max) / temperature + noise and then by the lower id; -1 for none.
struct Draw {
  double score;
  int64_t token;
  double logit;
};

// Softmax mass, about the row's maximum, and number of the logits above a bound.
struct Above {
  double mass;
  double count;
};

struct SampleRow {
  double temperature;  // >= 0; 0 is greedy, with statistics at temperature 1
  int64_t top_k;       // >= 1; no filter from the number of logits up
  double top_p;        // in (0, 1]; 1 is no filter
  double min_p;        // in [0, 1]; 0 is no filter
  uint64_t seed;
  uint64_t offset;
};

// Token -1 and NaN for a row without a softmax.
struct SampledToken {
  int64_t token;
  double logprob;
  double entropy;
};

}  // namespace aepo
