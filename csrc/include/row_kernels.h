// The kernels over rows of logits, torch-free: plain pointers and sizes, so that they compile in seconds and can be
// driven from a small main() under a sanitizer. The bindings add tensors, checks and threads.
#pragma once

#include <cstdint>

#include "sample.h"

namespace aepo {

enum LogitsType { kBFloat16, kFloat16, kFloat32, kFloat64, kNumLogitsTypes };

// Rows are always cut into segments of this many logits, whatever the number of rows and threads, and a row's segments
// are merged in order. So a row has the same bits alone or in a batch, on 1 thread or on 64.
constexpr int64_t kSegment = 32768;

inline int64_t num_segments(int64_t vocab) { return (vocab + kSegment - 1) / kSegment; }

// Softmax statistics of some logits x about their maximum, with z = x / temperature. `rest` leaves out one occurrence
// of the maximum, whose term is exactly 1: a sum with it would round a confident row's entropy away (1 + 1e-9 == 1 in
// float32), log1p(rest) keeps every digit.
struct SegmentStats {
  double max;       // of x; -inf while there is no finite logit
  double rest;      // sum exp(z_i - z_max) over all but one occurrence of the maximum
  double weighted;  // sum exp(z_i - z_max) (z_i - z_max), <= 0
};

// All NaN if the row holds NaN or +inf. Without a finite logit max is -inf and the others are NaN.
struct RowStats {
  double max;      // of x, an exact copy of a logit
  double log_sum;  // log sum exp(z_i - z_max), >= 0
  double entropy;  // >= 0, nats
};

// The gradient of one row:  out_i = p_i (uniform + slope y_i),  y_i = log2 p_i = (x_i - max) scale - offset.
struct RowGrad {
  double max;
  double scale;    // log2_scale(temperature)
  double offset;   // log2(e) log_sum
  double uniform;  // -(grad_logprob + grad_entropy entropy) / temperature
  double slope;    // -grad_entropy ln(2) / temperature
};

// What one segment's statistics leave for its gradient: the exponentials, in the order and about the maxima at which they
// were made. Both arrays hold float (double for float64 logits): kSegment of them, and kKeptMaxima.
struct Kept {
  void* exponentials;
  void* maxima;
};
constexpr int64_t kKeptMaxima = kSegment / 16;  // the smallest chunk, that of float64

// The kernels for one instruction set, indexed by LogitsType.
struct RowKernels {
  const char* name;
  // Statistics of n <= kSegment logits; scale = log2_scale(temperature).
  SegmentStats (*token_stats[kNumLogitsTypes])(const void* x, int64_t n, double scale);
  // Gradient of n logits, rounded once to their type; out may be x.
  void (*logits_grad[kNumLogitsTypes])(const void* x, void* out, int64_t n, const RowGrad& grad);
  // Look for a better draw among n logits, whose first is that of token `first`, a multiple of kSegment.
  void (*draw[kNumLogitsTypes])(const void* x, int64_t n, int64_t first, const DrawRow& row, Draw& best);
  // Add what lies above `threshold` among n <= kSegment logits, about max; scale = log2_scale(temperature).
  void (*above[kNumLogitsTypes])(const void* x, int64_t n, double threshold, double max, double scale, Above& total);
  // The same statistics, and the gradient of the same logits from what they keep.
  SegmentStats (*kept_stats[kNumLogitsTypes])(const void* x, int64_t n, double scale, const Kept& kept);
  void (*kept_grad[kNumLogitsTypes])(const void* x, void* out, int64_t n, const RowGrad& grad, const Kept& kept);
};

// The widest of avx512, avx2 and portable that this processor runs, or the one that the environment variable
// AEPO_CPU_CAPABILITY names (read once). Throws std::runtime_error if that one is unknown or not supported here.
const RowKernels& row_kernels();

// The token that one row of logits gives, and its statistics.
SampledToken sample_row(LogitsType type, const void* x, int64_t vocab, int64_t element_bytes, const SampleRow& params);

// log2(e) / temperature, within what a float holds.
double log2_scale(double temperature);

// Merge the n segments of one row.
RowStats merge_segments(const SegmentStats* segments, int64_t n, double temperature);

// log p of one logit of the row.
double label_logprob(double logit, const RowStats& stats, double temperature);

RowGrad row_grad(const RowStats& stats, double grad_logprob, double grad_entropy, double temperature);

// The gradient of the label's logit, whose log-prob has the extra term grad_logprob. Made apart from its row because
// 1 - p of a confident token has no digits left in float32; expm1(log p) has them all.
double label_grad(double logit, const RowStats& stats, double grad_logprob, double grad_entropy, double temperature);

double load_logit(LogitsType type, const void* x, int64_t i);
void store_logit(LogitsType type, void* x, int64_t i, double value);

}  // namespace aepo
