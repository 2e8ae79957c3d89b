#include "simd.h"

namespace dppo_fast {

extern const Simd simd_portable;
#ifdef DPPO_FAST_X86
extern const Simd simd_avx2;
extern const Simd simd_avx512;
#endif

const std::vector<const Simd*>& simd_levels() {
  static const std::vector<const Simd*> levels = [] {
    std::vector<const Simd*> found;
#ifdef DPPO_FAST_X86
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f")) found.push_back(&simd_avx512);
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) found.push_back(&simd_avx2);
#endif
    found.push_back(&simd_portable);
    return found;
  }();
  return levels;
}

}  // namespace dppo_fast
