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
std::vector<std::string> compiled_isas();

}  // namespace fb
