// Tensors as the CUDA kernels take them.
#pragma once

#include "cuda_kernels.h"
#include "tensors.h"

namespace aepo {

// A call (of cuda_kernels.h) with its logits and workspace filled in.
template <class Call>
Call cuda_call(const Tensor& logits, const Tensor& workspace) {
  using cuda::Workspace;
  const Rows rows(logits, "logits", at::kCUDA);
  TORCH_CHECK_VALUE(rows.vocab <= (1 << 30) && rows.count <= (1 << 30),
                    "logits must have at most 2^30 rows and columns; got ", logits.sizes());
  Call call;
  call.type = rows.type;
  call.logits = logits.data_ptr();
  call.rows = rows.count;
  call.vocab = rows.vocab;
  call.row_stride = logits.stride(0);
  call.workspace = {data<int32_t>(workspace, "workspace", workspace.numel(), at::kCUDA),
                    workspace.numel() * 4 / Workspace::kBytesPerBlock};
  return call;
}

}  // namespace aepo
