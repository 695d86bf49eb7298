// Channel gates with the shortcut behind them, forward and backward, over the pixels of NHWC maps.
//
//   y = act(x * s + residual)     s = sigmoid(w2 hidden + b2)     hidden = relu(w1 means + b1)     means = sum_pixels x / pixels
//
//   dz = dy where act passed its input, else 0                        dresidual = dz
//   ds = sum_pixels dz * x          d2 = ds * s * (1 - s)             d1 = (d2 w2) where hidden > 0, else 0
//   dx = dz * s + d1 w1 / pixels    dw2 = d2^T hidden, db2 = sum d2   dw1 = d1^T means, db1 = sum d1
//
// Where the activation passed is one bit an element (rows.h): backward reads no y, and x once.
#pragma once

#include <cstdint>

#include "../element.h"
#include "../isa.h"
#include "../rows.h"

namespace fb::squeeze_excite {

// What the kernels of an instruction set do to `rows` pixels of one image, in maps of a type T (element.h).
template <typename T>
struct Sums {
  RowsOf<T> dy;         // null: ones
  const uint8_t* mask;  // null: all pass
  int64_t mask_ld;
  RowsOf<T> x;
  int64_t rows, channels;
  double* sums;  // sum dz * x
  float* run;    // scratch, as many
};

template <typename T>
struct Apply {
  RowsOf<T> x, residual;
  int64_t rows, channels;
  const float* gate;
  int64_t activation;  // kNone, kRelu, kRelu6
  T* y;                // dense
  uint8_t* mask;       // null: not wanted
};

template <typename T>
struct Gradient {
  RowsOf<T> dy;
  const uint8_t* mask;
  int64_t rows, channels;
  const float *gate, *share;  // dx = dz * gate + share
  T *dx, *dresidual;          // dense; null: not wanted
};

// And to layers: y[n, k] = act(sum_i weight[k, i] x[n, i] + bias[k]), rows of the weight and of x side by side.
struct Dots {
  const float *x, *weight, *bias;  // the bias may be null
  int64_t images, inputs, outputs;
  int64_t activation;
  float* y;
  int64_t ldy;
};

// y[k, j] = sum_i a[k, i] b[i, j]
struct Product {
  const float* a;
  int64_t step_k, step_i;  // floats between a[k, i] and its neighbours
  const float* b;
  int64_t ldb;
  int64_t rows, inner, columns;  // k, i, j
  float* y;
  int64_t ldy;
};

template <typename T>
struct Kernels {
  void (*dots)(const Dots&);
  void (*product)(const Product&);
  void (*sums)(const Sums<T>&);
  void (*apply)(const Apply<T>&);
  void (*gradient)(const Gradient<T>&);
};

using Table = ForElements<Kernels>;
extern const Table kPortable, kAvx2, kAvx512;

struct Sizes {
  int64_t images, pixels, channels, hidden;  // pixels of each image; values between the layers
};

template <typename T>
struct Forward {
  Sizes sizes;
  RowsOf<T> x, residual;
  const float *weight1, *bias1, *weight2,
      *bias2;  // [hidden, channels], [hidden], [channels, hidden], [channels]; biases may be null
  int64_t activation;
  float *means, *hidden, *gate;  // [images, channels], [images, hidden], [images, channels]
  T* y;
  uint8_t* mask;  // null: not wanted
};

template <typename T>
struct Backward {
  Sizes sizes;
  RowsOf<T> dy, x;
  const uint8_t* mask;  // null without activation
  const float *weight1, *weight2, *means, *hidden, *gate;
  T *dx, *dresidual;                             // null: not wanted
  float *dweight1, *dbias1, *dweight2, *dbias2;  // null: not wanted
};

// No value depends on the number of threads, and none of an image on the others.
template <typename T>
void forward(const Forward<T>& t);
template <typename T>
void backward(const Backward<T>& t);

}  // namespace fb::squeeze_excite
