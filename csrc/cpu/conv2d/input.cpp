#include "input.h"

#include <algorithm>
#include <cstring>

namespace fb::conv2d {

Input::Input(const OpSpec& spec, const Kernels& kernels)
    : spec_(spec), kernels_(kernels), changed_(spec.pre != 0 || spec.pre_activation != kNone || kernels.channels_per_word > 1), p_(spec.p()), q_(spec.q()),
      group_c_(spec.c / spec.groups), words_(words(kernels, group_c_)), step_(spaced(words_)), hp_(spec.padded_h()), wp_(spec.padded_w()) {}

// Pixels `step` floats apart, one group of their channels.
void Input::copy_pixels(const Pointers& x, const float* source, int64_t step, int64_t pixels, int64_t group, float* out) const {
  if (changed_) {
    const float* scale = spec_.pre ? x.pre_scale + group * group_c_ : nullptr;
    const float* shift = spec_.pre ? x.pre_shift + group * group_c_ : nullptr;
    kernels_.change(source, step, pixels, group_c_, scale, shift, spec_.pre_activation, out, step_);
  } else if (step == group_c_ && step == step_) {
    std::memcpy(out, source, static_cast<size_t>(pixels * group_c_) * 4);
  } else {
    for (int64_t i = 0; i < pixels; ++i) std::memcpy(out + i * step_, source + i * step, static_cast<size_t>(group_c_) * 4);
  }
}

// The same from a planar image: pixels `step` floats apart in each channel's plane.
void Input::copy_planar(const float* source, int64_t step, int64_t pixels, float* out) const {
  const int64_t plane = spec_.h * spec_.w;
  if (group_c_ == 3 && step == 1) {  // an image: written front to back
    const float *red = source, *green = source + plane, *blue = source + 2 * plane;
    for (int64_t w = 0; w < pixels; ++w) {
      out[3 * w] = red[w];
      out[3 * w + 1] = green[w];
      out[3 * w + 2] = blue[w];
    }
    return;
  }
  for (int64_t c = 0; c < group_c_; ++c)
    for (int64_t w = 0; w < pixels; ++w) out[w * step_ + c] = source[c * plane + w * step];
}

void Input::gather(const Pointers& x, int64_t first, int64_t rows, int64_t group, float* out) const {
  const int64_t plane = spec_.h * spec_.w;
  for (int64_t row = first; row < first + rows; ++row, out += q_ * step_) {
    const int64_t image = row / p_, pixel = row % p_ * spec_.stride_h * spec_.w;
    if (spec_.nchw_in) {
      copy_planar(x.x + (image * spec_.c + group * group_c_) * plane + pixel, spec_.stride_w, q_, out);
      if (changed_) copy_pixels(x, out, step_, q_, group, out);
    } else {
      copy_pixels(x, x.x + (image * plane + pixel) * spec_.ldx + group * group_c_, spec_.stride_w * spec_.ldx, q_, group, out);
    }
  }
}

void Input::copy_rows(const Pointers& x, int64_t image, int64_t first, int64_t rows, int64_t group, float* out) const {
  const int64_t pad = spec_.pad_w * step_;
  for (int64_t row = first - spec_.pad_h; row < first - spec_.pad_h + rows; ++row, out += wp_ * step_) {
    if (row < 0 || row >= spec_.h) {
      std::fill(out, out + wp_ * step_, 0.0f);
      continue;
    }
    std::fill(out, out + pad, 0.0f);
    std::fill(out + pad + spec_.w * step_, out + wp_ * step_, 0.0f);
    float* inside = out + pad;
    if (spec_.nchw_in) {
      copy_planar(x.x + ((image * spec_.c + group * group_c_) * spec_.h + row) * spec_.w, 1, spec_.w, inside);
      if (changed_) copy_pixels(x, inside, step_, spec_.w, group, inside);
    } else {
      copy_pixels(x, x.x + (image * spec_.h + row) * spec_.w * spec_.ldx + group * group_c_, spec_.ldx, spec_.w, group, inside);
    }
  }
}

int64_t Input::unpadded_row(int64_t row) const {
  const int64_t image = std::min(row / hp_, spec_.n - 1);
  return image * spec_.h + std::clamp<int64_t>(row - image * hp_ - spec_.pad_h, 0, spec_.h);
}

}  // namespace fb::conv2d
