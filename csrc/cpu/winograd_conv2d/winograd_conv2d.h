// Transforms of Winograd's F(2x2, 3x3), one instruction set each.
#pragma once

#include <cstdint>

#include "../activation.h"
#include "../isa.h"

namespace fb::winograd_conv2d {

constexpr int kPoints = 16;  // 4 x 4 transformed values of a tile

struct InputTile {
  const float* source[kPoints];  // the tile's 4 x 4 pixels, row by row; pixels in the padding point to zeros
  float* v;                      // point i of channel c goes to v[i * v_stride + c]
  int64_t v_stride;
  int64_t channels;
};

struct OutputTile {
  const float* m;  // point i of column j at m[i * m_stride + j]
  int64_t m_stride;
  const float* bias;      // `columns` floats or null
  const float* residual[4];  // of the 2 x 2 output pixels; null where there is none
  float* y[4];               // null where the pixel lies outside the image
  int64_t columns;
  int64_t activation;  // none, relu or relu6
};

struct Transforms {
  void (*input)(const InputTile&);
  void (*output)(const OutputTile&);
};

extern const Transforms kPortable, kAvx2, kAvx512;

}  // namespace fb::winograd_conv2d
