// Numbers of the activations, as OpSpec::activation and its like hold them. No functions: target regions include this.
#pragma once

#include <cstdint>

namespace fb {

enum Activation : int64_t { kNone = 0, kRelu = 1, kRelu6 = 2, kSigmoid = 3, kTanh = 4 };

}  // namespace fb
