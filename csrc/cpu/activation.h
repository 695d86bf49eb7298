// Numbers of the activations, as OpSpec::activation and its like hold them. No functions: target regions include this.
#pragma once

#include <cstdint>

namespace fb {

// From kSigmoid on they cost more than a kernel's inner loop can afford.
enum Activation : int64_t {
  kNone = 0,
  kRelu = 1,
  kRelu6 = 2,
  kSigmoid = 3,
  kTanh = 4,
  kSilu = 5,
  kHardsigmoid = 6,
  kHardswish = 7,
  kGelu = 8,
  kGeluTanh = 9,
  kLastActivation = kGeluTanh
};

}  // namespace fb
