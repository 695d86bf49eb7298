// Cross entropy of rows of logits against smoothed targets, and its gradient.
//
//   q'[k] = w[k] ((1 - eps) [k = y] + eps / K)     loss = -sum_k q'[k] log p[k],  p = softmax(x)     gradient = g ((sum_k q'[k]) p - q')
#pragma once

#include <cstdint>

#include "../isa.h"

namespace fb::softmax_cross_entropy {

// What the kernels of an instruction set find in one row, with d[k] = x[k] - max.
struct Sums {
  float max;           // NaN is passed over: the sums have it
  double exponential;  // sum_k exp(d[k])
  double distance;     // sum_k w[k] d[k], w = 1 without weight
};

struct Gradient {
  const float* x;
  const float* weight;
  int64_t classes, label;
  float max, scale;        // y[k] = exp(x[k] - max) * scale - even * w[k],
  float even, own;         // and own is taken away instead in the label's class
  float* y;
};

struct Kernels {
  Sums (*sums)(const float* x, const float* weight, int64_t classes);
  void (*gradient)(const Gradient&);
};

extern const Kernels kPortable, kAvx2, kAvx512;

enum class Reduction { none, sum, mean };  // mean: over the sum of w[y]

struct Problem {
  const float* logits;  // [rows, classes], ld floats between rows
  int64_t ld, rows, classes;
  const int64_t* target;  // [rows], a class or ignore_index
  const float* weight;    // [classes] or null
  double smoothing;       // eps
  int64_t ignore_index;   // rows with this target have loss and gradient 0 and do not count in the mean
  Reduction reduction;
};

constexpr int64_t kRowFloats = 2;  // what backward needs of a row beside its logits: the maximum and the sum of exponentials

int64_t wrong_row(const Problem& problem);  // the first whose target is neither a class nor ignore_index, or -1

// loss: [rows] when nothing is reduced, else one float; kept: [rows, kRowFloats].
void forward(const Problem& problem, float* kept, float* loss);

// grad: of the loss, grad_stride floats between rows when nothing is reduced; y: [rows, classes], dense.
void backward(const Problem& problem, const float* kept, const float* grad, int64_t grad_stride, float* y);

}  // namespace fb::softmax_cross_entropy
