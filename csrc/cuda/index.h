// Index arithmetic of the CUDA kernels, in functions that run on the host too: tests/native/cuda_index.cpp walks every
// index of awkward shapes with g++, so that a wrong index is found without a GPU. No CUDA header, no torch header.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define FB_HD __host__ __device__ __forceinline__
#else
#define FB_HD inline
#endif

namespace fb::cuda {

enum class Layout { nhwc, nchw };

// x [N, H, W, C] or [N, C, H, W]  ->  y [N, P, Q, C] or [N, C, P, Q], both dense.
template <typename Int>
struct PoolShape {
  Int n, h, w, c, p, q;
  int r, s, stride_h, stride_w, pad_h, pad_w;
};

// One output pixel and the first of its channels.
template <typename Int>
struct Place {
  Int n, p, q, c;
};

// The part of a window that lies inside the image: [begin, end). Empty when the window is all padding.
template <typename Int>
struct Span {
  Int begin, end;
};

template <typename Int>
FB_HD Span<Int> window(Int out, int stride, int pad, int size, Int limit) {
  // Int may be unsigned: compare before subtracting.
  const Int start = out * stride;
  const Int begin = start > static_cast<Int>(pad) ? start - pad : Int(0);
  const Int past = start + size > static_cast<Int>(pad) ? start + size - pad : Int(0);
  const Int end = past < limit ? past : limit;
  return {begin < end ? begin : end, end};
}

// Windows along one axis. In ceil mode the last window may hang over the edge, but must start before the right padding.
FB_HD int64_t pooled(int64_t size, int64_t window, int64_t stride, int64_t pad, bool ceil_mode) {
  const int64_t room = size + 2 * pad - window;
  int64_t outputs = (room + (ceil_mode ? stride - 1 : 0)) / stride + 1;
  if (ceil_mode && (outputs - 1) * stride >= size + pad) --outputs;
  return outputs;
}

// How many work items a pooling has when each writes `vec` neighbouring channels (nhwc) or one element (nchw).
FB_HD int64_t pool_items(Layout layout, int64_t n, int64_t p, int64_t q, int64_t c, int vec) {
  return layout == Layout::nhwc ? n * p * q * (c / vec) : n * c * p * q;
}

// Work item -> output place. Neighbouring items are neighbours in memory in either layout.
template <Layout layout, int vec, typename Int>
FB_HD Place<Int> split(Int item, const PoolShape<Int>& shape) {
  Place<Int> place;
  if (layout == Layout::nhwc) {
    const Int groups = shape.c / vec;
    const Int pixel = item / groups;
    place.c = (item - pixel * groups) * vec;
    const Int row = pixel / shape.q;
    place.q = pixel - row * shape.q;
    place.n = row / shape.p;
    place.p = row - place.n * shape.p;
  } else {
    const Int row = item / shape.q;
    place.q = item - row * shape.q;
    const Int plane = row / shape.p;
    place.p = row - plane * shape.p;
    place.n = plane / shape.c;
    place.c = plane - place.n * shape.c;
  }
  return place;
}

// Offset, in elements, of (n, row, column, c) in a dense tensor of `rows` x `columns` pixels.
template <Layout layout, typename Int>
FB_HD Int offset(Int n, Int row, Int column, Int c, Int rows, Int columns, Int channels) {
  return layout == Layout::nhwc ? ((n * rows + row) * columns + column) * channels + c
                                : ((n * channels + c) * rows + row) * columns + column;
}

// x [N, H, W, C]  ->  y [N, P, Q, K], pixels `pixel_x` and `pixel_y` elements apart, rows and images without gaps.
struct ConvShape {
  int64_t n;
  int h, w, c, p, q, k;
  int r, s, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;
  int64_t pixel_x, pixel_y;
};

FB_HD int64_t parts(int64_t size, int64_t part) { return (size + part - 1) / part; }

// What a thread of a depthwise convolution computes: `across` output pixels side by side, in `down` rows, of `vec`
// neighbouring channels.
struct Strips {
  int groups, columns, rows;  // of an image: vectors of channels, strips of a row, stacks of rows
};

FB_HD Strips strips_of(const ConvShape& shape, int vec, int across, int down) {
  return {static_cast<int>(parts(shape.c, vec)), static_cast<int>(parts(shape.q, across)),
          static_cast<int>(parts(shape.p, down))};
}

FB_HD int64_t strip_count(int64_t images, const Strips& strips) {
  return images * strips.groups * strips.columns * strips.rows;
}

// Neighbouring items are neighbouring channels, then neighbouring strips of a row. `vec`, `across`, `down` as above.
FB_HD Place<int> strip(unsigned item, const Strips& strips, int vec, int across, int down) {
  const unsigned column = item / strips.groups, row = column / strips.columns, image = row / strips.rows;
  return {static_cast<int>(image), static_cast<int>(row - image * strips.rows) * down,
          static_cast<int>(column - row * strips.columns) * across,
          static_cast<int>(item - column * strips.groups) * vec};
}

// A tile of output pixels in a block's shared memory: `rows` x `columns` of them, and the input under their windows.
template <int kRows, int kColumns, int kStride, int kWindow>
struct Tile {
  static constexpr int rows = kRows, columns = kColumns, pixels = kRows * kColumns;
  static constexpr int in_rows = (kRows - 1) * kStride + kWindow, in_columns = (kColumns - 1) * kStride + kWindow;
  static constexpr int in_pixels = in_rows * in_columns;

  // The input pixel of the tile that lies under an output pixel's first tap.
  FB_HD static int under(int pixel) {
    return pixel / kColumns * kStride * in_columns + pixel % kColumns * kStride;
  }

  // Where chunk `chunk` of the 8 chunks of a pixel lies, in chunks of 16 bytes. Eight pixels that are neighbours in an
  // output row lie in eight different columns of banks.
  FB_HD static int at(int in_pixel, int chunk) { return in_pixel * 8 + (chunk ^ (in_pixel / kStride & 7)); }
  FB_HD static int at_output(int pixel, int chunk) { return pixel * 8 + (chunk ^ (pixel & 7)); }
};

}  // namespace fb::cuda
