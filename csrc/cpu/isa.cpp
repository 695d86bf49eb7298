#include "isa.h"

#include <cstdlib>
#include <stdexcept>

namespace fb {

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::avx512: return "avx512";
    case Isa::avx2: return "avx2";
    default: return "portable";
  }
}

Isa detected_isa() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl")) {
    return Isa::avx512;
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return Isa::avx2;
#endif
  return Isa::portable;
}

namespace {

Isa capped_isa() {
  const Isa best = detected_isa();
  const char* cap = std::getenv("FB_MAX_ISA");
  if (cap == nullptr || *cap == '\0') return best;
  const std::string text(cap);
  for (int i = 0; i < kIsaCount; ++i) {
    const Isa candidate = static_cast<Isa>(i);
    if (text == isa_name(candidate)) return candidate < best ? candidate : best;
  }
  throw std::invalid_argument("FB_MAX_ISA is '" + text + "', expected portable, avx2 or avx512");
}

}  // namespace

Isa isa() {
  static const Isa chosen = capped_isa();
  return chosen;
}

bool has_bf16() {
#if defined(__x86_64__)
  return isa() == Isa::avx512 && __builtin_cpu_supports("avx512bf16");
#else
  return false;
#endif
}

std::vector<std::string> compiled_isas() {
#if defined(__x86_64__)
  return {"portable", "avx2", "avx512"};
#else
  return {"portable"};
#endif
}

}  // namespace fb
