// dx: a task is some rows. dw: rows of dy are cut into chunks, whoever computes them; a chunk adds up in float for some rows, in double
// from there on, and chunks are added in their order.
#include "depthwise_conv2d_backward.h"

#include <algorithm>
#include <vector>

#include "../memory.h"
#include "../ops.h"

namespace fb::depthwise_conv2d_backward {

namespace {

constexpr int64_t kTaskProducts = 1 << 19;
constexpr int64_t kRunPixels = 256;    // summed in float
constexpr int64_t kPixelsPerTap = 32;  // of a chunk: with fewer, its sums are more memory than its maps
constexpr int64_t kMostChunks = 64;
constexpr int64_t kWidth = 256;  // channels of a task: its sums fit in L1

// Larger maps do not wait in a cache for whoever reads them. Not reading them before they are written: 64x112x112, stride 2, takes 3.0 ms
// for 16 images instead of 5.8 (one thread).
constexpr int64_t kStreamBytes = 16 << 20;

const Kernels& kernels() { return FB_TABLE_OF(isa()); }

}  // namespace

void input_gradient(const OpSpec& spec, const float* grad, int64_t ldg, const float* weight, float* dx) {
  const int64_t p = spec.p(), q = spec.q(), rows = spec.n * spec.h;
  const int64_t products = std::max<int64_t>(1, q * spec.c * spec.r * spec.s / spec.stride_h);
  const int64_t rows_of_task = std::clamp<int64_t>(kTaskProducts / products, 1, spec.h);
  const bool whole_lines = spec.c % 16 == 0 && reinterpret_cast<uintptr_t>(dx) % 64 == 0;
  const bool stream = whole_lines && rows * spec.w * spec.c * 4 >= kStreamBytes;
  parallel_for(ceil_div(rows, rows_of_task), rows * products, [&](int64_t task) {
    InputRow row{};
    row.ldg = ldg;
    row.q = q;
    row.ldw = row.ldy = row.channels = spec.c;
    row.width = spec.w;
    row.s = spec.s;
    row.stride = spec.stride_w;
    row.dilation = spec.dilation_w;
    row.pad = spec.pad_w;
    row.stream = stream;
    for (int64_t i = task * rows_of_task; i < std::min(rows, (task + 1) * rows_of_task); ++i) {
      const int64_t image = i / spec.h, h = i % spec.h;
      row.rows = 0;
      for (int64_t r = 0; r < spec.r; ++r) {
        const int64_t up = h + spec.pad_h - r * spec.dilation_h;
        if (up < 0 || up % spec.stride_h != 0 || up / spec.stride_h >= p) continue;
        row.grad[row.rows] = grad + (image * p + up / spec.stride_h) * q * ldg;
        row.weight[row.rows++] = weight + r * spec.s * spec.c;
      }
      row.y = dx + i * spec.w * spec.c;
      kernels().input_row(row);
    }
  });
}

void weight_gradient(const OpSpec& spec, const float* grad, int64_t ldg, const float* x, float* dw, const int64_t steps[3]) {
  const int64_t p = spec.p(), q = spec.q(), rows = spec.n * p, taps = spec.r * spec.s;
  const int64_t least = ceil_div(kPixelsPerTap * taps, q);
  const int64_t rows_of_chunk = std::max(least, ceil_div(rows, kMostChunks)), rows_of_run = std::max<int64_t>(1, kRunPixels / q);
  const int64_t chunks = ceil_div(rows, rows_of_chunk), parts = ceil_div(spec.c, kWidth);
  std::vector<double> totals(static_cast<size_t>(chunks * taps * spec.c));
  parallel_for(chunks * parts, rows * q * spec.c * taps, [&](int64_t task) {
    const int64_t chunk = task / parts, c = task % parts * kWidth, width = std::min(kWidth, spec.c - c), count = taps * width;
    AlignedFloats memory;
    WeightRow row{};
    row.ldg = ldg;
    row.pixels = q;
    row.ldx = spec.ldx;
    row.width = spec.w;
    row.sums = memory.reserve(count);
    row.ldw = row.channels = width;
    row.r = spec.r;
    row.s = spec.s;
    row.stride = spec.stride_w;
    row.dilation = spec.dilation_w;
    row.pad = spec.pad_w;
    double* const total = totals.data() + chunk * taps * spec.c + c * taps;
    const int64_t end = std::min(rows, (chunk + 1) * rows_of_chunk);
    for (int64_t run = chunk * rows_of_chunk; run < end; run += rows_of_run) {
      std::fill(row.sums, row.sums + count, 0.0f);
      for (int64_t i = run; i < std::min(end, run + rows_of_run); ++i) {
        const int64_t image = i / p, first = i % p * spec.stride_h - spec.pad_h;
        for (int64_t r = 0; r < spec.r; ++r) {
          const int64_t h = first + r * spec.dilation_h;
          row.x[r] = h < 0 || h >= spec.h ? nullptr : x + (image * spec.h + h) * spec.w * spec.ldx + c;
        }
        row.grad = grad + i * q * ldg + c;
        kernels().weight_row(row);
      }
      kernels().add(total, row.sums, count);
    }
  });
  parallel_for(parts, chunks * taps * spec.c, [&](int64_t part) {
    const int64_t c0 = part * kWidth, width = std::min(kWidth, spec.c - c0);
    double* const sums = totals.data() + c0 * taps;
    for (int64_t chunk = 1; chunk < chunks; ++chunk) {
      const double* const more = sums + chunk * taps * spec.c;
      for (int64_t i = 0; i < taps * width; ++i) sums[i] += more[i];
    }
    for (int64_t tap = 0; tap < taps; ++tap) {
      for (int64_t c = 0; c < width; ++c) {
        dw[(c0 + c) * steps[0] + tap / spec.s * steps[1] + tap % spec.s * steps[2]] = static_cast<float>(sums[tap * width + c]);
      }
    }
  });
}

}  // namespace fb::depthwise_conv2d_backward
