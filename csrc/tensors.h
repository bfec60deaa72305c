// Tensors as the kernels take them, shared by the files that bind native operations: checked pointers, and the work
// split over threads.
#pragma once

#include <ATen/MemoryOverlap.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <optional>

#include "row_kernels.h"

namespace aepo {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// Logits [T, V] by rows, with 64-bit offsets: T * V may exceed 2^31.
class Rows {
 public:
  Rows(const Tensor& logits, const char* name, at::DeviceType device = at::kCPU) {
    TORCH_CHECK_VALUE(logits.device().type() == device && logits.dim() == 2, name, " must be [T, V] on ", device,
                      "; got shape ", logits.sizes(), " on ", logits.device());
    count = logits.size(0);
    vocab = logits.size(1);
    TORCH_CHECK_VALUE(vocab <= 1 || logits.stride(1) == 1, name, " must have a contiguous last dimension; got strides ",
                      logits.strides());
    type = logits_type(logits, name);
    acc = type == kFloat64 ? at::kDouble : at::kFloat;
    data_ = static_cast<char*>(logits.data_ptr());
    element_bytes = logits.element_size();
    row_bytes_ = logits.stride(0) * element_bytes;
  }

  char* at(int64_t row, int64_t column = 0) const { return data_ + row * row_bytes_ + column * element_bytes; }

  int64_t count, vocab, element_bytes;
  LogitsType type;
  at::ScalarType acc;  // of per-row numbers

 private:
  static LogitsType logits_type(const Tensor& logits, const char* name) {
    switch (logits.scalar_type()) {
      case at::kBFloat16:
        return kBFloat16;
      case at::kHalf:
        return kFloat16;
      case at::kFloat:
        return kFloat32;
      case at::kDouble:
        return kFloat64;
      default:
        TORCH_CHECK_TYPE(false, name, " must be bfloat16, float16, float32 or float64; got ", logits.scalar_type());
    }
  }

  char* data_;
  int64_t row_bytes_;
};

// The checked data of a tensor with `count` elements, or null for an absent one.
template <class T>
T* data(const OptionalTensor& x, const char* name, int64_t count, at::DeviceType device = at::kCPU) {
  if (!x.has_value()) return nullptr;
  constexpr at::ScalarType type = c10::CppTypeToScalarType<T>::value;
  TORCH_CHECK_VALUE(x->device().type() == device && x->scalar_type() == type && x->is_contiguous() &&
                        x->numel() == count,
                    name, " must be contiguous ", type, " on ", device, " with ", count, " elements; got ",
                    x->scalar_type(), " ", x->sizes(), " on ", x->device());
  return x->data_ptr<T>();
}

// One floating point number per row, read and written as double.
class Column {
 public:
  Column(const OptionalTensor& x, const char* name, const Rows& rows)
      : float64_(rows.acc == at::kDouble),
        data_(float64_ ? static_cast<void*>(data<double>(x, name, rows.count)) : data<float>(x, name, rows.count)) {}

  bool given() const { return data_ != nullptr; }
  double operator[](int64_t i) const {
    return float64_ ? static_cast<const double*>(data_)[i] : static_cast<const float*>(data_)[i];
  }
  void set(int64_t i, double value) const {
    if (float64_) {
      static_cast<double*>(data_)[i] = value;
    } else {
      static_cast<float*>(data_)[i] = static_cast<float>(value);
    }
  }

 private:
  bool float64_;
  void* data_;
};

// The column of a label in rows whose first logit is that of token `vocab_start`, or -1: a label out of range must not
// be read. The operations above raise for it on the CPU.
inline int64_t label_column(int64_t label, int64_t vocab_start, int64_t vocab) {
  return label >= vocab_start && label - vocab_start < vocab ? label - vocab_start : -1;
}

// The log-prob of row t's label in column `label`; NaN for -1.
inline double row_logprob(const Rows& rows, int64_t t, int64_t label, const RowStats& stats, double temperature) {
  const double logit = label >= 0 ? load_logit(rows.type, rows.at(t), label) : std::nan("");
  return label_logprob(logit, stats, temperature);
}

// Write the gradient of row t's n logits from `column` on by `kernel(x, out, n, grad)`, and that of a label among them.
// Rows may be grads.
template <class Kernel>
void segment_grad(const Rows& rows, const Rows& grads, int64_t t, int64_t column, int64_t n, int64_t label,
                  const RowStats& stats, double grad_logprob, double grad_entropy, double temperature,
                  const Kernel& kernel) {
  const bool has_label = grad_logprob != 0 && label >= column && label < column + n;
  const double logit = has_label ? load_logit(rows.type, rows.at(t), label) : 0;  // before it is overwritten
  kernel(rows.at(t, column), grads.at(t, column), n, row_grad(stats, grad_logprob, grad_entropy, temperature));
  if (!has_label) return;
  store_logit(rows.type, grads.at(t), label, label_grad(logit, stats, grad_logprob, grad_entropy, temperature));
}

inline void zero_segment(const Rows& grads, int64_t t, int64_t column, int64_t n) {
  std::memset(grads.at(t, column), 0, n * grads.element_bytes);
}

// The checked place of a gradient like `rows`, which it may be, but not partly.
inline Rows grads_like(const Rows& rows, const Tensor& logits, const Tensor& out) {
  const Rows grads(out, "out");
  TORCH_CHECK_VALUE(grads.type == rows.type && out.sizes() == logits.sizes(), "out must be like the logits, ",
                    logits.scalar_type(), " ", logits.sizes(), "; got ", out.scalar_type(), " ", out.sizes());
  at::assert_no_internal_overlap(out);
  at::assert_no_partial_overlap(out, logits);
  return grads;
}

// body(row, first column, number of columns) for every segment of every row, over all threads. A task is about one
// segment's work, so that one long row and many short ones both spread evenly.
template <class Body>
void for_each_segment(int64_t num_rows, int64_t vocab, const Body& body) {
  const int64_t segments = num_segments(vocab);
  const int64_t grain = std::max<int64_t>(1, kSegment / std::max<int64_t>(1, vocab));
  at::parallel_for(0, num_rows * segments, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) {
      const int64_t column = i % segments * kSegment;
      body(i / segments, column, std::min(kSegment, vocab - column));
    }
  });
}

}  // namespace aepo
