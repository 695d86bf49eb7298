// Which instruction sets this machine can run, and which one the kernels use.
//
// The choice is made once per process: the best set that the CPU and the operating system support, capped by the environment
// variable FB_MAX_ISA (portable, avx2, avx512). Every kernel table is indexed by Isa.
#pragma once

#include <string>
#include <vector>

namespace fb {

enum class Isa { portable = 0, avx2 = 1, avx512 = 2 };

inline constexpr int kIsaCount = 3;

const char* isa_name(Isa isa);
Isa detected_isa();                     // what the CPU can run, cap ignored
Isa isa();                              // detected_isa() capped by FB_MAX_ISA; throws std::invalid_argument on a misspelt cap
bool has_bf16();                        // isa() is avx512 and the CPU multiplies bfloat16 pairs (AVX512-BF16)
std::vector<std::string> compiled_isas();

template <class Table>
const Table& table_of(Isa isa, const Table& portable, const Table& avx2, const Table& avx512) {
  return isa == Isa::avx512 ? avx512 : isa == Isa::avx2 ? avx2 : portable;
}

// The kernel table of an instruction set, among an op's own kPortable, kAvx2 and kAvx512; other processors have the first alone.
#if defined(__x86_64__)
#define FB_TABLE_OF(isa) ::fb::table_of(isa, kPortable, kAvx2, kAvx512)
#else
#define FB_TABLE_OF(isa) (static_cast<void>(isa), kPortable)
#endif

}  // namespace fb
