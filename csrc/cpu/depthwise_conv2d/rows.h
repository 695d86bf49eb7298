// Rows of a depthwise convolution, wherever they are wanted.
#pragma once

#include "../op.h"

namespace fb::depthwise_conv2d {

// Output rows `rows`, counted over all images, of the op that `spec` describes (complete: no stride is 0), next to each other from y
// on, pixels ldy floats apart. Reads x, weight, bias, pre_scale and pre_shift of the pointers.
void compute_rows(const OpSpec& spec, const Pointers& x, Range rows, float* y, int64_t ldy);

}  // namespace fb::depthwise_conv2d
