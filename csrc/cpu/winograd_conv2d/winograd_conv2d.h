// Winograd's F(m x m, 3x3) for m = 2 and 4: the shapes of its forms, and their transforms, one instruction set each.
#pragma once

#include <cstdint>

#include "../activation.h"
#include "../isa.h"

namespace fb::winograd_conv2d {

constexpr int kMaxInputs = 36, kMaxOutputs = 16;

struct Form {
  int side;    // m: a tile is m x m outputs, made from (m + 2) x (m + 2) pixels
  int points;  // products of a tile for each pair of input and output channel
};

// The last has real points alone: fewer products, more error.
constexpr Form kForm2x2 = {2, 16}, kForm4x4 = {4, 46}, kForm4x4Real = {4, 36};

struct InputTile {
  const float* source[kMaxInputs];  // the tile's pixels, row by row; pixels in the padding point to zeros
  float* v;                         // point i of channel c goes to v[i * v_stride + c]; of bfloat16 pairs to the word of c
  int64_t v_stride;
  int64_t channels;
};

struct OutputTile {
  const float* m;  // point i of column j at m[i * m_stride + j]
  int64_t m_stride;
  const float* scale;                  // `columns` floats or null
  const float* bias;                   // `columns` floats or null
  const float* residual[kMaxOutputs];  // of the output pixels, row by row; null where there is none
  float* y[kMaxOutputs];               // null where the pixel lies outside the image
  int64_t columns;
  int64_t activation;  // none, relu or relu6
};

struct Transforms {
  void (*input)(const InputTile&);
  void (*output)(const OutputTile&);
};

struct Kernels {
  Transforms by2x2, by4x4, by4x4_real;
};

extern const Kernels kPortable, kAvx2, kAvx512, kAvx512Bf16;

// Filters transformed side by side by `transform_filters`.
constexpr int64_t kFilters = 32;

// w[9][kFilters] to u[points][kFilters].
void transform_filters(const Form& form, const float* w, float* u);

}  // namespace fb::winograd_conv2d
