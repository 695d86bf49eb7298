// Batch normalisation with what follows it, forward and backward, over rows of channels (the pixels of an NHWC map).
//
//   y = act((x - mean) * scale + bias + residual)     scale = weight / sqrt(var + eps), moments over all rows
//
//   dz = dy where act passes its input, else 0         dbias = sum dz     dweight = sum dz (x - mean) / sqrt(var + eps)
//   dx = scale * (dz - sum dz / rows - (x - mean) * sum dz (x - mean) / (rows (var + eps)))     dresidual = dz
//
// With frozen moments dx = scale * dz. Each of the four passes reads its maps once. Where the activation passed is one bit an element, 32
// times smaller than y, or computed again from x: backward reads no y.
#pragma once

#include <cstdint>

#include "../element.h"
#include "../isa.h"
#include "../rows.h"

namespace fb::batch_norm {

template <typename T>
using Map = RowsOf<T>;

// What the kernels of an instruction set do to `rows` rows of maps of a type T (element.h).
template <typename T>
struct Moments {
  Map<T> x;
  int64_t rows, channels;
  double *sum, *squares;  // sum x, sum (x - centre)^2
  float *centre, *run;    // the mean, rounded; scratch, as many
};

template <typename T>
struct Apply {
  Map<T> x, residual;
  int64_t rows, channels;
  const float *mean, *scale, *bias;
  int64_t activation;  // kNone, kRelu, kRelu6
  T* y;                // dense
  uint8_t* mask;       // null: not wanted
};

// Where the activation passed its input: where a bit is set, or where x * scale + shift is inside. Neither: everywhere.
struct Passed {
  const uint8_t* bits;
  const float *scale, *shift;
  int64_t activation;  // kRelu or kRelu6, beside scale and shift

  // From a row of so many channels on, from a channel on.
  Passed from(int64_t row, int64_t channels, int64_t c) const {
    if (bits != nullptr) return {bits + row * mask_stride(channels) + c / 8, nullptr, nullptr, activation};
    return scale != nullptr ? Passed{nullptr, scale + c, shift + c, activation} : *this;
  }
};

template <typename T>
struct Sums {
  Map<T> dy, x;
  Passed passed;
  int64_t mask_ld;  // bytes from row to row of its bits
  int64_t rows, channels;
  const float* mean;
  double *dz, *dz_x;  // sum dz, sum dz (x - mean)
  float* scratch;     // 2 * channels
};

template <typename T>
struct Gradient {
  Map<T> dy, x;
  Passed passed;
  int64_t rows, channels;
  const float *mean, *scale;
  const float *offset, *slope;  // dx = scale * (dz - offset - (x - mean) * slope); null: dx = scale * dz
  Map<T> added;                 // to dx; null: nothing
  T *dx, *dresidual;            // dense; null: not wanted
};

template <typename T>
struct Kernels {
  void (*moments)(const Moments<T>&);
  void (*apply)(const Apply<T>&);
  void (*sums)(const Sums<T>&);
  void (*gradient)(const Gradient<T>&);
};

using Table = ForElements<Kernels>;
extern const Table kPortable, kAvx2, kAvx512;

// Mean and biased variance of each channel, in double: the same for any number of threads.
template <typename T>
void moments(Map<T> x, int64_t rows, int64_t channels, double* mean, double* variance);

// All rows of `t`.
template <typename T>
void apply(const Apply<T>& t);

// sum dz and sum dz (x - mean) over all rows; those of t, its mask_ld and its scratch are not used.
template <typename T>
void sums(const Sums<T>& t, double* dz, double* dz_x);

template <typename T>
void gradient(const Gradient<T>& t);

}  // namespace fb::batch_norm
