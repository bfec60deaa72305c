// The kernels of each translation unit that is compiled for its own instruction set.
#pragma once

#include "row_kernels.h"

namespace aepo {

#if defined(__x86_64__)
extern const RowKernels kAvx512;
extern const RowKernels kAvx2;
#endif
extern const RowKernels kPortable;

// The only float64 kernels, shared by all three.
SegmentStats token_stats_float64(const void* x, int64_t n, double scale);
void logits_grad_float64(const void* x, void* out, int64_t n, const RowGrad& grad);
SegmentStats kept_stats_float64(const void* x, int64_t n, double scale, const Kept& kept);
void kept_grad_float64(const void* x, void* out, int64_t n, const RowGrad& grad, const Kept& kept);
void draw_float64(const void* x, int64_t n, int64_t first, const DrawRow& row, Draw& best);
void above_float64(const void* x, int64_t n, double threshold, double max, double scale, Above& total);

}  // namespace aepo
