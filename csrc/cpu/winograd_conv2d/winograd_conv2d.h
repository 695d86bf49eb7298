// Winograd's F(m x m, 3x3) for m = 2 and 4, F(2x2, 5x5) and F(4, 7) along a line: the shapes of the forms, and their transforms, one instruction set each.
#pragma once

#include <cstdint>

#include "../activation.h"
#include "../isa.h"

namespace fb::winograd_conv2d {

constexpr int kMaxInputs = 36, kMaxOutputs = 16, kMaxTaps = 25, kMaxPoints = 46;

struct Form {
  const char* name;
  int out_h, out_w;    // outputs of a tile
  int taps_h, taps_w;  // of the filter
  int points;          // products of a tile for each pair of input and output channel

  int in_h() const { return out_h + taps_h - 1; }
  int in_w() const { return out_w + taps_w - 1; }
};

// "Real": with real points alone, fewer products and more error.
inline constexpr Form kForm2x2 = {"F(2x2,3x3)", 2, 2, 3, 3, 16}, kForm4x4 = {"F(4x4,3x3)", 4, 4, 3, 3, 46},
                      kForm4x4Real = {"F(4x4,3x3) at real points,", 4, 4, 3, 3, 36}, kForm2x2Five = {"F(2x2,5x5)", 2, 2, 5, 5, 46}, kForm1x4 = {"F(1x4,1x7)", 1, 4, 1, 7, 13},
                      kForm4x1 = {"F(4x1,7x1)", 4, 1, 7, 1, 13};

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
  int64_t activation;
};

struct Transforms {
  void (*input)(const InputTile&);
  void (*output)(const OutputTile&);
};

struct Kernels {
  Transforms by2x2, by4x4, by4x4_real, by2x2_five, line;
};

extern const Kernels kPortable, kAvx2, kAvx512, kAvx512Bf16;

// Filters transformed side by side by `transform_filters`.
constexpr int64_t kFilters = 32;

// w[taps][kFilters] to u[points][kFilters].
void transform_filters(const Form& form, const float* w, float* u);

}  // namespace fb::winograd_conv2d
