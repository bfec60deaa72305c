// Which instruction set serves this process.
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "isa.h"

namespace aepo {
namespace {

const RowKernels& choose() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  const struct {
    const RowKernels& kernels;
    bool supported;
  } widest_first[] = {{kAvx512, avx512}, {kAvx2, avx2}, {kPortable, true}};
#else
  const struct {
    const RowKernels& kernels;
    bool supported;
  } widest_first[] = {{kPortable, true}};
#endif
  const char* wanted = std::getenv("AEPO_CPU_CAPABILITY");
  std::string here;
  for (const auto& candidate : widest_first) {
    if (!candidate.supported) continue;
    if (wanted == nullptr || candidate.kernels.name == std::string(wanted)) return candidate.kernels;
    here += std::string(here.empty() ? "" : ", ") + candidate.kernels.name;
  }
  throw std::runtime_error("AEPO_CPU_CAPABILITY=" + std::string(wanted) + " is not available: this processor runs " +
                           here);
}

}  // namespace

const RowKernels& row_kernels() {
  static const RowKernels& chosen = choose();
  return chosen;
}

}  // namespace aepo
