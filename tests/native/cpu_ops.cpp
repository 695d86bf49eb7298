// Runs the CPU kernels without Python, for the sanitizers: buffers of exactly the promised size, small integers, several
// threads, and a comparison to the bit with the formula written as plain loops.
//
//   cmake -S . -B build/asan -G Ninja -DFB_TORCH=OFF -DFB_SANITIZE=address && cmake --build build/asan && build/asan/fb_check
//
// FB_MAX_ISA picks the instruction set. Exit status 0: every case held.
#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "isa.h"
#include "op.h"
#include "softmax_cross_entropy/softmax_cross_entropy.h"

namespace {

// Exactly `size` floats on a cache line, NaN at first: what a kernel forgets to write cannot pass. Never reads past its end.
class Buffer {
 public:
  explicit Buffer(int64_t size) : size_(size) {
    void* memory = nullptr;
    if (posix_memalign(&memory, 64, size_t(size > 0 ? size : 1) * sizeof(float)) != 0) std::abort();
    data_ = static_cast<float*>(memory);
    for (int64_t i = 0; i < size; ++i) data_[i] = NAN;
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { std::free(data_); }

  float* data() const { return data_; }
  int64_t size() const { return size_; }
  float& operator[](int64_t i) const { return data_[i]; }

  void fill(int low, int high, int scale, uint32_t seed) {
    for (int64_t i = 0; i < size_; ++i) {
      seed = seed * 1664525u + 1013904223u;
      data_[i] = float((low + int((seed >> 16) % uint32_t(high - low + 1))) * scale);
    }
  }

 private:
  float* data_;
  int64_t size_;
};

void on_threads(int64_t n, void (*body)(void*), void* context) {
  std::vector<std::thread> crew;
  for (int64_t i = 1; i < (n > 0 ? n : 2); ++i) crew.emplace_back(body, context);
  body(context);
  for (std::thread& one : crew) one.join();
}

int64_t last_pixel_end(int64_t pixels, int64_t ld, int64_t channels) {
  return pixels > 0 ? (pixels - 1) * ld + channels : 0;
}

using Map = std::function<float(int64_t n, int64_t row, int64_t column, int64_t channel)>;

// Rows or columns of window i: `count` of them are counted by an average, those of [begin, end) lie inside.
struct Extent {
  int64_t begin, end, count;
};

Extent extent(int64_t i, int64_t size, int64_t outputs, int64_t window, int64_t stride, int64_t pad, int64_t after, bool adaptive, bool count_pad) {
  if (adaptive) {
    const int64_t begin = i * size / outputs, end = ((i + 1) * size + outputs - 1) / outputs;
    return {begin, end, end - begin};
  }
  const int64_t begin = i * stride - pad, end = std::min(begin + window, size + after);
  const int64_t inside = std::max<int64_t>(begin, 0), inside_end = std::min(end, size);
  return {inside, inside_end, count_pad ? end - begin : inside_end - inside};
}

float average(const fb::OpSpec& spec, const Map& x, int64_t n, int64_t p, int64_t q, int64_t k) {
  const bool adaptive = spec.out_h > 0, count_pad = spec.count_include_pad != 0;
  const Extent rows = extent(p, spec.h, spec.p(), spec.r, spec.stride_h, spec.pad_h, spec.bottom(), adaptive, count_pad);
  const Extent columns = extent(q, spec.w, spec.q(), spec.s, spec.stride_w, spec.pad_w, spec.right(), adaptive, count_pad);
  float sum = 0;
  for (int64_t h = rows.begin; h < rows.end; ++h)
    for (int64_t w = columns.begin; w < columns.end; ++w) sum += x(n, h, w, k);
  return sum / float(rows.count * columns.count);
}

float normalised(const fb::OpSpec& spec, const Map& x, int64_t n, int64_t p, int64_t q, int64_t k) {  // beta 1 and alpha = size: exact
  float sum = float(spec.offset);
  for (int64_t c = std::max<int64_t>(0, k - spec.size / 2); c <= std::min(spec.c - 1, k + (spec.size - 1) / 2); ++c)
    sum += x(n, p, q, c) * x(n, p, q, c);
  return x(n, p, q, k) / sum;
}

float activated(float x, int64_t activation) {
  if (activation != fb::kNone) x = std::fmax(x, 0.0f);
  return activation == fb::kRelu6 ? std::fmin(x, 6.0f) : x;
}

// The formulas. x is 0 outside the image for a convolution, and left out by a pool. Residual and gate may be empty.
float expected(const fb::OpSpec& spec, const Map& x, const Buffer& weight, const Buffer& bias, const Buffer& residual, const Buffer& gate,
               int64_t n, int64_t p, int64_t q, int64_t k) {
  if (spec.kind == "to_nchw" || spec.kind == "to_nhwc") return x(n, p, q, k);
  if (spec.kind == "global_avg_pool") {
    float sum = 0;
    for (int64_t h = 0; h < spec.h; ++h)
      for (int64_t w = 0; w < spec.w; ++w) sum += x(n, h, w, k);
    return sum / float(spec.h * spec.w);
  }
  if (spec.kind == "avg_pool2d") return average(spec, x, n, p, q, k);
  if (spec.kind == "local_response_norm") return normalised(spec, x, n, p, q, k);
  if (spec.kind == "l2_normalize") {
    float squares = 0;
    for (int64_t c = 0; c < spec.c; ++c) squares += x(n, p, q, c) * x(n, p, q, c);
    return x(n, p, q, k) / std::fmax(std::sqrt(squares), float(spec.eps));
  }
  if (spec.kind == "squared_distances") {
    float sum = 0;
    for (int64_t c = 0; c < spec.c; ++c) sum += (x(n, 0, 0, c) - weight[k * spec.c + c]) * (x(n, 0, 0, c) - weight[k * spec.c + c]);
    return sum;
  }
  if (spec.kind == "channel_shuffle") return x(n, p, q, k % spec.groups * (spec.c / spec.groups) + k / spec.groups);
  if (spec.kind == "leaky_relu") return x(n, p, q, k) * (x(n, p, q, k) > 0 ? 1.0f : float(spec.alpha));
  if (spec.kind == "upsample_nearest2d") return x(n, p * spec.h / spec.out_h, q * spec.w / spec.out_w, k);
  if (spec.kind == "pad2d") {
    const int64_t h = p - spec.pad_h, w = q - spec.pad_w;
    return h < 0 || h >= spec.h || w < 0 || w >= spec.w ? float(spec.border) : x(n, h, w, k);
  }
  const bool pool = spec.kind == "max_pool2d";
  const int64_t inputs = spec.c / spec.groups, group = k / (spec.k / spec.groups);
  float sum = pool ? -INFINITY : bias[k];
  for (int64_t r = 0; r < spec.r; ++r) {
    for (int64_t s = 0; s < spec.s; ++s) {
      const int64_t h = p * spec.stride_h + r * spec.dilation_h - spec.pad_h, w = q * spec.stride_w + s * spec.dilation_w - spec.pad_w;
      if (h < 0 || h >= spec.h || w < 0 || w >= spec.w) continue;
      if (pool) {
        sum = std::fmax(sum, x(n, h, w, k));
        continue;
      }
      for (int64_t c = 0; c < inputs; ++c) sum += x(n, h, w, group * inputs + c) * weight[((k * inputs + c) * spec.r + r) * spec.s + s];
    }
  }
  if (pool) return sum;
  if (gate.size() > 0) sum *= gate[n * spec.k + k];
  if (residual.size() > 0) sum += residual[((n * spec.p() + p) * spec.q() + q) * spec.k + k];
  return k < spec.act_from ? sum : activated(sum, spec.activation);
}

bool has_weight(const fb::OpSpec& spec) {
  return spec.kind == "conv2d" || spec.kind == "winograd_conv2d" || spec.kind == "grouped_conv2d" ||
         spec.kind == "depthwise_conv2d" || spec.kind == "separable_conv2d" || spec.kind == "affine" || spec.kind == "linear" || spec.kind == "squared_distances";
}

// The two convolutions of a separable one.
fb::OpSpec depth_part(fb::OpSpec spec) {
  spec.kind = "depthwise_conv2d";
  spec.k = spec.groups = spec.c;
  spec.activation = spec.depth_activation;
  spec.depth_activation = fb::kNone;
  return spec;
}

fb::OpSpec pointwise_part(const fb::OpSpec& spec) {
  fb::OpSpec out;
  out.kind = "conv2d";
  out.n = spec.n, out.h = spec.p(), out.w = spec.q(), out.c = spec.c, out.k = spec.k, out.activation = spec.activation;
  return out;
}

bool has_residual(const fb::OpSpec& spec) { return has_weight(spec) && spec.kind != "linear" && spec.kind != "depthwise_conv2d" && spec.kind != "squared_distances"; }

std::string text(const fb::OpSpec& spec) {
  std::string out = spec.kind + " n" + std::to_string(spec.n) + " " + std::to_string(spec.h) + "x" + std::to_string(spec.w) + " " +
                    std::to_string(spec.c) + "->" + std::to_string(spec.k) + " window " + std::to_string(spec.r) + "x" + std::to_string(spec.s) +
                    " stride " + std::to_string(spec.stride_h) + " groups " + std::to_string(spec.groups);
  if (spec.pad_bottom >= 0) out += " border " + std::to_string(spec.pad_bottom) + ", " + std::to_string(spec.pad_right);
  return out + (spec.nchw_in ? " planar" : "") + (spec.ldx ? " strided" : "");
}

bool check(const fb::OpSpec& spec, bool with_residual) {
  const bool spatial = has_weight(spec) || spec.kind == "max_pool2d" || spec.kind == "avg_pool2d" || spec.kind == "pad2d" ||
                       spec.kind == "upsample_nearest2d";
  const int64_t p = spec.kind == "global_avg_pool" ? 1 : spatial ? spec.p() : spec.h;
  const int64_t q = spec.kind == "global_avg_pool" ? 1 : spatial ? spec.q() : spec.w;
  const bool planar_in = spec.nchw_in || spec.kind == "to_nhwc", planar_out = spec.kind == "to_nchw";
  const int64_t ldx = spec.ldx ? spec.ldx : spec.c, ldy = spec.ldy ? spec.ldy : spec.k;
  const int64_t pixels_in = spec.n * spec.h * spec.w, pixels_out = spec.n * p * q;

  Buffer x(planar_in ? pixels_in * spec.c : last_pixel_end(pixels_in, ldx, spec.c));
  Buffer y(planar_out ? pixels_out * spec.k : last_pixel_end(pixels_out, ldy, spec.k));
  const bool separable = spec.kind == "separable_conv2d";
  const fb::OpSpec depth = depth_part(spec), last = separable ? pointwise_part(spec) : spec;
  Buffer weight(has_weight(spec) ? spec.k * (spec.c / spec.groups) * last.r * last.s : 0);
  Buffer depth_weight(separable ? spec.c * spec.r * spec.s : 0), depth_bias(separable ? spec.c : 0);
  Buffer depth_packed(separable ? fb::packed_floats(depth) : 0);
  Buffer gate(spec.gated ? spec.n * spec.k : 0), scale(spec.pre ? spec.c : 0), shift(spec.pre ? spec.c : 0), nothing(0);
  Buffer bias(has_weight(spec) ? spec.k : 0);
  Buffer residual(with_residual ? pixels_out * spec.k : 0);
  Buffer packed(has_weight(spec) ? fb::packed_floats(spec) : 0);
  x.fill(-3, 3, 1, 1);
  if (spec.kind == "global_avg_pool") x.fill(-3, 3, int(spec.h * spec.w), 1);  // then the mean is an integer
  weight.fill(-2, 2, 4, 2);  // multiples of 4: the transforms of F(2x2, 3x3) stay exact
  bias.fill(-5, 5, 1, 3);
  residual.fill(-5, 5, 1, 4);
  depth_weight.fill(-2, 2, 1, 5);
  depth_bias.fill(-3, 3, 1, 6);
  gate.fill(-2, 2, 1, 7);
  scale.fill(-2, 2, 1, 8);
  shift.fill(-3, 3, 1, 9);
  if (separable) fb::pack_weight(depth, depth_weight.data(), depth_packed.data());
  if (has_weight(spec)) fb::pack_weight(spec, weight.data(), packed.data());

  fb::Pointers pointers;
  pointers.x = x.data();
  pointers.y = y.data();
  if (has_weight(spec)) pointers.weight = packed.data(), pointers.bias = bias.data();
  if (with_residual) pointers.residual = residual.data();
  if (separable) pointers.depth_weight = depth_packed.data(), pointers.depth_bias = depth_bias.data();
  if (spec.gated) pointers.gate = gate.data();
  if (spec.pre) pointers.pre_scale = scale.data(), pointers.pre_shift = shift.data();

  const Map at = [&](int64_t n, int64_t h, int64_t w, int64_t c) {
    const float v = planar_in ? x[((n * spec.c + c) * spec.h + h) * spec.w + w] : x[((n * spec.h + h) * spec.w + w) * ldx + c];
    return activated(spec.pre ? v * scale[c] + shift[c] : v, spec.pre_activation);
  };
  const Map between = [&](int64_t n, int64_t h, int64_t w, int64_t c) {
    return expected(depth, at, depth_weight, depth_bias, nothing, nothing, n, h, w, c);
  };
  for (const int threads : {1, 3}) {
    for (int64_t i = 0; i < y.size(); ++i) y[i] = NAN;
    fb::run_op(spec, pointers, threads);
    for (int64_t n = 0; n < spec.n; ++n)
      for (int64_t row = 0; row < p; ++row)
        for (int64_t column = 0; column < q; ++column)
          for (int64_t k = 0; k < spec.k; ++k) {
            const int64_t pixel = (n * p + row) * q + column;
            const float got = planar_out ? y[((n * spec.k + k) * p + row) * q + column] : y[pixel * ldy + k];
            const float want = expected(last, separable ? between : at, weight, bias, residual, gate, n, row, column, k);
            if (got != want) {
              std::fprintf(stderr, "%s, %d threads: y[%d, %d, %d, %d] is %g, expected %g\n", text(spec).c_str(), threads, int(n), int(row),
                           int(column), int(k), double(got), double(want));
              return false;
            }
          }
    // Between strided pixels lies somebody else's memory.
    for (int64_t pixel = 0; pixel + 1 < pixels_out && !planar_out; ++pixel)
      for (int64_t k = spec.k; k < ldy; ++k)
        if (!std::isnan(y[pixel * ldy + k])) {
          std::fprintf(stderr, "%s: wrote between its pixels\n", text(spec).c_str());
          return false;
        }
  }
  return true;
}

fb::OpSpec conv(const char* kind, int64_t n, int64_t h, int64_t w, int64_t c, int64_t k, int64_t window, int64_t stride, int64_t pad,
                int64_t groups = 1) {
  fb::OpSpec spec;
  spec.kind = kind;
  spec.n = n, spec.h = h, spec.w = w, spec.c = c, spec.k = k;
  spec.r = spec.s = window, spec.stride_h = spec.stride_w = stride, spec.pad_h = spec.pad_w = pad, spec.groups = groups;
  return spec;
}

std::vector<fb::OpSpec> cases() {
  std::vector<fb::OpSpec> all = {
      conv("conv2d", 1, 1, 1, 1, 1, 1, 1, 0),      conv("conv2d", 2, 7, 5, 13, 35, 1, 1, 0),    conv("conv2d", 1, 9, 9, 64, 70, 1, 2, 0),
      conv("conv2d", 2, 6, 11, 5, 17, 3, 2, 1),    conv("conv2d", 1, 2, 2, 8, 16, 3, 1, 1),     conv("conv2d", 1, 17, 15, 3, 64, 7, 2, 3),
      conv("conv2d", 1, 5, 5, 600, 48, 1, 1, 0),   conv("conv2d", 2, 5, 7, 12, 18, 3, 1, 1, 3), conv("conv2d", 1, 1, 1, 16, 32, 5, 1, 2),
      conv("winograd_conv2d", 1, 8, 8, 16, 16, 3, 1, 1), conv("winograd_conv2d", 2, 7, 9, 19, 37, 3, 1, 1),
      conv("winograd_conv2d", 1, 14, 14, 64, 64, 3, 1, 0), conv("winograd_conv2d", 3, 3, 1, 5, 3, 3, 1, 1),
      conv("winograd_conv2d", 2, 7, 9, 19, 37, 5, 1, 2), conv("winograd_conv2d", 1, 30, 27, 33, 40, 5, 1, 0), conv("winograd_conv2d", 3, 3, 1, 5, 3, 5, 1, 2),
      conv("grouped_conv2d", 1, 7, 9, 32, 32, 3, 1, 1, 8), conv("grouped_conv2d", 2, 8, 6, 64, 64, 3, 2, 1, 8),
      conv("grouped_conv2d", 1, 5, 5, 48, 48, 3, 1, 1, 3), conv("grouped_conv2d", 2, 1, 2, 96, 96, 3, 2, 1, 3),
      conv("depthwise_conv2d", 2, 9, 15, 35, 35, 3, 1, 1, 35), conv("depthwise_conv2d", 1, 8, 13, 48, 48, 3, 2, 1, 48),
      conv("depthwise_conv2d", 1, 1, 1, 3, 3, 3, 1, 1, 3), conv("depthwise_conv2d", 2, 12, 17, 21, 21, 5, 1, 2, 21),
      conv("affine", 2, 9, 5, 35, 35, 1, 1, 0, 35), conv("affine", 3, 1, 1, 64, 64, 1, 1, 0, 64),
      conv("avg_pool2d", 2, 7, 9, 13, 13, 3, 1, 1), conv("avg_pool2d", 1, 6, 6, 64, 64, 2, 2, 0), conv("avg_pool2d", 1, 12, 21, 35, 35, 11, 1, 5),
      conv("max_pool2d", 2, 7, 9, 13, 13, 3, 2, 1), conv("max_pool2d", 1, 6, 6, 64, 64, 2, 2, 0), conv("max_pool2d", 1, 1, 1, 3, 3, 3, 1, 1),
      conv("global_avg_pool", 2, 7, 7, 37, 37, 1, 1, 0), conv("global_avg_pool", 1, 1, 1, 16, 16, 1, 1, 0),
      conv("linear", 3, 1, 1, 70, 33, 1, 1, 0),     conv("linear", 1, 1, 1, 1, 1, 1, 1, 0),
      conv("to_nchw", 2, 5, 7, 19, 19, 1, 1, 0),    conv("to_nhwc", 2, 5, 7, 19, 19, 1, 1, 0),  conv("to_nhwc", 1, 16, 16, 3, 3, 1, 1, 0),
      conv("conv2d", 0, 4, 4, 8, 8, 3, 1, 1)};
  for (const auto& [n, h, w, c, k] : {std::array<int64_t, 5>{1, 8, 8, 16, 16}, {2, 7, 9, 19, 37}, {1, 30, 27, 64, 70}, {3, 3, 1, 5, 3}}) {
    fb::OpSpec large_tiles = conv("winograd_conv2d", n, h, w, c, k, 3, 1, 1);
    large_tiles.tile = 4;
    all.push_back(large_tiles);
  }
  fb::OpSpec stem = conv("conv2d", 2, 19, 13, 3, 64, 7, 2, 3);
  stem.nchw_in = 1;
  all.push_back(stem);
  fb::OpSpec dilated = conv("conv2d", 1, 9, 8, 6, 10, 3, 1, 2);
  dilated.dilation_h = dilated.dilation_w = 2;
  all.push_back(dilated);
  fb::OpSpec ceil = conv("max_pool2d", 1, 8, 7, 5, 5, 3, 2, 0);
  ceil.ceil_mode = 1;
  all.push_back(ceil);
  for (const fb::OpSpec& plain : {conv("conv2d", 2, 6, 11, 5, 17, 3, 2, 0), conv("conv2d", 2, 5, 4, 350, 72, 3, 1, 1), conv("grouped_conv2d", 2, 8, 6, 64, 64, 3, 2, 0, 8),
                                  conv("depthwise_conv2d", 1, 8, 14, 48, 48, 3, 2, 0, 48), conv("separable_conv2d", 2, 8, 7, 21, 40, 3, 2, 0),
                                  conv("avg_pool2d", 2, 8, 6, 13, 13, 3, 2, 0), conv("max_pool2d", 2, 8, 6, 13, 13, 3, 2, 0), conv("pad2d", 2, 5, 7, 13, 13, 1, 1, 2)}) {
    for (const auto& [bottom, right] : {std::array<int64_t, 2>{1, 1}, {0, 1}, {1, 0}}) {
      fb::OpSpec one = plain;
      one.pad_bottom = bottom, one.pad_right = right, one.border = 7;
      all.push_back(one);
    }
  }
  for (const auto& [gated, pre, act_from] : {std::array<int64_t, 3>{1, 0, 0}, {0, 1, 0}, {0, 0, 32}, {1, 1, 32}}) {
    for (const fb::OpSpec& plain : {conv("conv2d", 3, 3, 5, 40, 70, 1, 1, 0), conv("conv2d", 2, 6, 7, 13, 35, 3, 2, 1), conv("conv2d", 2, 7, 5, 900, 131, 1, 2, 0),
                                    conv("conv2d", 2, 5, 4, 350, 72, 3, 1, 1)}) {
      fb::OpSpec one = plain;
      one.gated = gated, one.pre = pre, one.pre_activation = pre, one.act_from = act_from;
      all.push_back(one);
    }
  }
  for (const fb::OpSpec& plain : {conv("separable_conv2d", 2, 9, 11, 21, 40, 3, 1, 1), conv("separable_conv2d", 1, 8, 7, 33, 17, 3, 2, 1),
                                  conv("separable_conv2d", 2, 5, 4, 420, 260, 3, 1, 1), conv("separable_conv2d", 1, 1, 1, 5, 3, 5, 1, 2)}) {
    fb::OpSpec one = plain;
    one.depth_activation = fb::kRelu6;
    all.push_back(one);
  }
  for (const int64_t count_pad : {0, 1}) {
    fb::OpSpec average = conv("avg_pool2d", 2, 8, 7, 21, 21, 3, 2, 1);
    average.ceil_mode = 1;
    average.count_include_pad = count_pad;
    all.push_back(average);
  }
  fb::OpSpec gated = conv("affine", 3, 5, 7, 40, 40, 1, 1, 0, 40);
  gated.gated = 1;
  all.push_back(gated);
  fb::OpSpec adaptive = conv("avg_pool2d", 1, 13, 9, 20, 20, 1, 1, 0);
  adaptive.out_h = 6, adaptive.out_w = 14;
  all.push_back(adaptive);
  for (const int64_t size : {1, 4, 5}) {
    fb::OpSpec norm = conv("local_response_norm", 2, 3, 7, 37, 37, 1, 1, 0);
    norm.size = size, norm.alpha = double(size), norm.beta = 1, norm.offset = 2;
    all.push_back(norm);
  }
  for (const auto& [n, h, c] : {std::array<int64_t, 3>{3, 1, 512}, {2, 9, 37}, {1, 1, 1}}) {
    fb::OpSpec unit = conv("l2_normalize", n, h, h, c, c, 1, 1, 0);
    unit.eps = 0.5;
    all.push_back(unit);
    all.push_back(conv("squared_distances", n * h, 1, 1, c, 11, 1, 1, 0));
  }
  for (const int64_t groups : {1, 2, 3}) all.push_back(conv("channel_shuffle", 2, 3, 7, 36, 36, 1, 1, 0, groups));
  fb::OpSpec leaky = conv("leaky_relu", 2, 3, 7, 37, 37, 1, 1, 0);
  leaky.alpha = 0.5;
  all.push_back(leaky);
  fb::OpSpec larger = conv("upsample_nearest2d", 2, 3, 7, 37, 37, 1, 1, 0);
  larger.out_h = 6, larger.out_w = 28;
  all.push_back(larger);
  const size_t dense = all.size();
  for (size_t i = 0; i < dense; ++i) {  // the same, as slices of wider maps
    fb::OpSpec slice = all[i];
    if (slice.nchw_in || slice.kind[0] == 't' || slice.kind == "linear") continue;
    slice.ldx = slice.c + 5;
    if (slice.kind != "global_avg_pool") slice.ldy = slice.k + 3;
    all.push_back(slice);
  }
  return all;
}

namespace loss = fb::softmax_cross_entropy;

// Loss and gradient of one row in double, for an upstream gradient of 1.
double plain_row(const loss::Problem& problem, int64_t row, std::vector<double>& gradient) {
  const float* x = problem.logits + row * problem.ld;
  const int64_t classes = problem.classes, label = problem.target[row];
  double sum = 0, value = 0, shares = 0;
  std::vector<double> share(static_cast<size_t>(classes));
  for (int64_t k = 0; k < classes; ++k) sum += std::exp(double(x[k]));
  for (int64_t k = 0; k < classes; ++k) {
    share[k] = (problem.weight ? problem.weight[k] : 1.0) * (problem.smoothing / double(classes) + (k == label ? 1 - problem.smoothing : 0.0));
    shares += share[k];
    value -= share[k] * (double(x[k]) - std::log(sum));
  }
  for (int64_t k = 0; k < classes; ++k) gradient[k] = shares * std::exp(double(x[k])) / sum - share[k];
  return value;
}

// One problem without reduction; the last row is ignored.
bool check_loss(int64_t rows, int64_t classes, int64_t ld, bool weighted) {
  Buffer logits((rows - 1) * ld + classes), weight(classes), kept(rows * loss::kRowFloats), value(rows), grad(rows), y(rows * classes);
  logits.fill(-4, 4, 1, 1);
  weight.fill(1, 3, 1, 2);
  grad.fill(1, 1, 1, 3);
  std::vector<int64_t> target(static_cast<size_t>(rows));
  for (int64_t row = 0; row < rows; ++row) target[row] = row + 1 < rows ? (row * 5) % classes : -100;
  const loss::Problem problem{logits.data(), ld, rows, classes, target.data(), weighted ? weight.data() : nullptr, 0.1, -100, loss::Reduction::none};
  loss::forward(problem, kept.data(), value.data());
  loss::backward(problem, kept.data(), grad.data(), 1, y.data());
  bool good = loss::wrong_row(problem) == -1;
  std::vector<double> gradient(static_cast<size_t>(classes));
  for (int64_t row = 0; row < rows; ++row) {
    const bool ignored = target[row] == -100;
    const double exact = ignored ? 0.0 : plain_row(problem, row, gradient);
    good &= std::fabs(value[row] - exact) <= 1e-5 * (1 + exact);
    for (int64_t k = 0; k < classes; ++k) good &= std::fabs(y[row * classes + k] - (ignored ? 0.0 : gradient[k])) <= 1e-6;
  }
  if (!good) std::fprintf(stderr, "softmax_cross_entropy of %ld x %ld is wrong\n", long(rows), long(classes));
  return good;
}

}  // namespace

int main() {
  fb::set_parallel(on_threads, [] { return int64_t{2}; });
  int failed = 0, count = 0;
  for (const fb::OpSpec& spec : cases()) {
    if (const std::string reason = fb::refusal(spec); !reason.empty()) {
      std::fprintf(stderr, "%s is refused: %s\n", text(spec).c_str(), reason.c_str());
      ++failed;
      continue;
    }
    for (const bool residual : {false, true}) {
      if (residual && !has_residual(spec)) continue;
      fb::OpSpec one = spec;
      one.activation = residual ? 1 : 0;
      failed += !check(one, residual);
      ++count;
    }
  }
  for (const int64_t classes : {1, 2, 7, 16, 17, 64, 511, 513, 1001}) {
    for (const bool weighted : {false, true}) {
      failed += !check_loss(40, classes, classes + (weighted ? 3 : 0), weighted);
      ++count;
    }
  }
  std::printf("%d passed, %d failed\n", count - failed, failed);
  return failed != 0;
}
