// Filters for the gradient of a convolution's input, which is a convolution of the output's gradient.
#pragma once

#include <cstdint>

namespace fb {

// out[g][c][k][taps - 1 - t] = weight[g][k][c][t], `filters` k and `channels` c in each of the groups: upside down, inputs and outputs
// exchanged.
void turn_filters(const float* weight, int64_t groups, int64_t filters, int64_t channels, int64_t taps, float* out);

}  // namespace fb
