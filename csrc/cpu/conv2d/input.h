// The input of a convolution as its products want it: scaled and activated where asked for, padded, next to each other.
#pragma once

#include "../op.h"
#include "conv2d.h"

namespace fb::conv2d {

class Input {
 public:
  Input(const OpSpec& spec, const Kernels& kernels);

  int64_t padded_rows() const { return hp_; }     // of an image
  int64_t padded_columns() const { return wp_; }

  int64_t pixel_words() const { return words_; }   // of one group
  int64_t pixel_step() const { return step_; }     // words from pixel to pixel of the copy

  // The pixels that output rows [first, first + rows), counted over all images, of a 1x1 convolution read, pixel_step apart, in words.
  void gather(const Pointers& x, int64_t first, int64_t rows, int64_t group, float* out) const;

  // Rows [first, first + rows) of the zero-padded image: [rows][padded w][pixel_step]. Padding stays zero.
  void copy_rows(const Pointers& x, int64_t image, int64_t first, int64_t rows, int64_t group, float* out) const;

  // A row of the padded images, all images stacked, as a row of the unpadded ones; rows in the padding move inwards.
  int64_t unpadded_row(int64_t row) const;

 private:
  void copy_pixels(const Pointers& x, const float* source, int64_t step, int64_t pixels, int64_t group, float* out) const;
  void copy_planar(const float* source, int64_t step, int64_t pixels, float* out) const;

  const OpSpec& spec_;
  const Kernels& kernels_;
  bool changed_;  // by pre or pre_activation, or to bfloat16
  int64_t p_, q_, group_c_, words_, step_, hp_, wp_;
};

}  // namespace fb::conv2d
