#pragma once

#include <cstddef>
#include <cstdint>

namespace aepo {

// The hardware prefetcher stops at each 4 KiB page, and a loop of this much arithmetic cannot hide a miss by itself.
// Asking one page ahead took 256 rows of 151,936 bfloat16 logits from 11.8 to 7.8 ms forward and from 14.7 to 9.5 ms
// in-place backward, one thread; 2 and 8 KiB are within 10 % (2-core AVX-512 Xeon, Sapphire Rapids class VM).
constexpr int64_t kPrefetchBytes = 4096;

__attribute__((always_inline)) inline void prefetch_ahead(const void* here, size_t bytes) {
  for (size_t line = 0; line < bytes; line += 64) {
    __builtin_prefetch(static_cast<const char*>(here) + kPrefetchBytes + line);
  }
}

}  // namespace aepo
