// What this machine can do at most: the denominators of every "share of peak".
#pragma once

#include <cstdint>

#include "../isa.h"

namespace fb::peaks {

double fma_portable(int64_t rounds), fma_avx2(int64_t rounds), fma_avx512(int64_t rounds), bf16_avx512(int64_t rounds);  // returns flops done; registers only

}  // namespace fb::peaks
