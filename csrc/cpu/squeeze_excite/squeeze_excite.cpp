// A thread takes an image through all passes, the small layers included, while the image is in its cache: x, or the gradient, comes
// from memory once. Where there are fewer images than threads, each pass of all images is cut: sums by channels, the rest by pixels.
// Both ways do the same arithmetic in the same order.
#include "squeeze_excite.h"

#include <algorithm>
#include <cstddef>
#include <functional>
#include <memory>
#include <vector>

#include "../ops.h"

namespace fb::squeeze_excite {

namespace {

constexpr int64_t kWidth = 512;            // channels that are summed up together: their sums fit in L1
constexpr int64_t kPart = 64;              // of them in a task of few images
constexpr int64_t kPieceFloats = 1 << 15;  // of a pass by pixels: what is read last by one pass is read first by the next

const Kernels& kernels() { return FB_TABLE_OF(isa()); }

using Floats = std::vector<float>;

Floats transposed(const float* matrix, int64_t rows, int64_t columns) {
  Floats out(static_cast<size_t>(rows * columns));
  constexpr int64_t kTile = 16;
  for (int64_t i0 = 0; i0 < rows; i0 += kTile)
    for (int64_t j0 = 0; j0 < columns; j0 += kTile)
      for (int64_t j = j0; j < std::min(columns, j0 + kTile); ++j)
        for (int64_t i = i0; i < std::min(rows, i0 + kTile); ++i) out[j * rows + i] = matrix[i * columns + j];
  return out;
}

// y = act(x weight^T + bias) for rows of x; the weight, [outputs, inputs], is packed once.
class Layer {
 public:
  Layer(int64_t inputs, int64_t outputs, const float* weight, const float* bias, int64_t activation) : bias_(bias) {
    spec_.kind = "linear";
    spec_.c = inputs;
    spec_.k = outputs;
    spec_.activation = activation;
    packed_.resize(static_cast<size_t>(packed_floats(spec_)));
    pack_weight(spec_, weight, packed_.data());
  }

  void run(const float* x, int64_t rows, float* y, int threads) const {
    OpSpec spec = spec_;
    spec.n = rows;
    Pointers pointers;
    pointers.x = x;
    pointers.weight = packed_.data();
    pointers.bias = bias_;
    pointers.y = y;
    run_op(spec, pointers, threads);
  }

 private:
  OpSpec spec_;
  Floats packed_;
  const float* bias_;
};

// Some images, on one thread or on all.
struct Images {
  int64_t begin, end;
  bool together;  // on all threads

  int threads() const { return together ? 0 : 1; }

  void loop(int64_t count, int64_t work, const std::function<void(int64_t)>& body) const {
    if (together) return parallel_for(count, work, body);
    for (int64_t i = 0; i < count; ++i) body(i);
  }
};

// body(images) until all have had their turn; what would leave threads idle is done together.
void for_images(const Sizes& sizes, const std::function<void(const Images&)>& body) {
  const int64_t rest = sizes.images % thread_count(), alone = sizes.images - rest;
  parallel_for(alone, alone * (sizes.pixels + sizes.hidden) * sizes.channels,
               [&](int64_t image) { body({image, image + 1, false}); });
  if (rest > 0) body({alone, sizes.images, true});
}

// body(image, its first pixel of all, how many) in pieces, from the last one to the first.
void for_pieces(const Images& images, const Sizes& sizes, const std::function<void(int64_t, int64_t, int64_t)>& body) {
  const int64_t each = std::max<int64_t>(kPieceFloats / sizes.channels, 1), pieces = ceil_div(sizes.pixels, each);
  const int64_t count = (images.end - images.begin) * pieces;
  images.loop(count, count * each * sizes.channels, [&](int64_t i) {
    const int64_t task = count - 1 - i, image = images.begin + task / pieces, first = task % pieces * each;
    body(image, image * sizes.pixels + first, std::min(each, sizes.pixels - first));
  });
}

// finish(image, channel, sum over pixels of dz * x).
void for_sums(const Images& images, const Sizes& sizes, Sums all, const std::function<void(int64_t, int64_t, double)>& finish) {
  const int64_t width = images.together ? kPart : kWidth, parts = ceil_div(sizes.channels, width);
  const int64_t count = (images.end - images.begin) * parts;
  images.loop(count, count * width * sizes.pixels, [&](int64_t task) {
    double sums[kWidth];
    float run[kWidth];
    const int64_t image = images.begin + task / parts, c = task % parts * width, row = image * sizes.pixels;
    Sums part = all;
    part.x.data = all.x.from(row).data + c;
    if (all.dy.data != nullptr) part.dy.data = all.dy.from(row).data + c;
    if (all.mask != nullptr) part.mask = all.mask + row * all.mask_ld + c / 8;
    part.rows = sizes.pixels;
    part.channels = std::min(width, sizes.channels - c);
    part.sums = sums;
    part.run = run;
    kernels().sums(part);
    for (int64_t i = 0; i < part.channels; ++i) finish(image, c + i, sums[i]);
  });
}

// dweight = d^T x, [outputs, inputs], and dbias = sum d over images.
void layer_gradient(const Sizes& sizes, const float* d, int64_t outputs, const float* x, int64_t inputs, float* dweight,
                    float* dbias) {
  if (dweight != nullptr) {
    const Layer product(sizes.images, inputs, transposed(x, sizes.images, inputs).data(), nullptr, kNone);
    product.run(transposed(d, sizes.images, outputs).data(), outputs, dweight, 0);
  }
  for (int64_t k = 0; dbias != nullptr && k < outputs; ++k) {
    double sum = 0.0;
    for (int64_t n = 0; n < sizes.images; ++n) sum += d[n * outputs + k];
    dbias[k] = static_cast<float>(sum);
  }
}

}  // namespace

void forward(const Forward& t) {
  const Sizes& s = t.sizes;
  const Layer first(s.channels, s.hidden, t.weight1, t.bias1, kRelu), second(s.hidden, s.channels, t.weight2, t.bias2, kSigmoid);
  const auto pixels = static_cast<double>(s.pixels);
  Sums sums{};
  sums.x = t.x;
  for_images(s, [&](const Images& images) {
    const int64_t n = images.begin, count = images.end - images.begin;
    for_sums(images, s, sums,
             [&](int64_t image, int64_t c, double sum) { t.means[image * s.channels + c] = static_cast<float>(sum / pixels); });
    first.run(t.means + n * s.channels, count, t.hidden + n * s.hidden, images.threads());
    second.run(t.hidden + n * s.hidden, count, t.gate + n * s.channels, images.threads());
    for_pieces(images, s, [&](int64_t image, int64_t row, int64_t rows) {
      Apply part{};
      part.x = t.x.from(row);
      part.residual = t.residual.from(row);
      part.rows = rows;
      part.channels = s.channels;
      part.gate = t.gate + image * s.channels;
      part.activation = t.activation;
      part.y = t.y + row * s.channels;
      if (t.mask != nullptr) part.mask = t.mask + row * mask_stride(s.channels);
      kernels().apply(part);
    });
  });
}

void backward(const Backward& t) {
  const Sizes& s = t.sizes;
  const bool first = t.dx != nullptr || t.dweight1 != nullptr || t.dbias1 != nullptr;  // as far as the first layer
  const bool layers = first || t.dweight2 != nullptr || t.dbias2 != nullptr;
  const auto pixels = static_cast<float>(s.pixels);
  Floats d2(static_cast<size_t>(layers ? s.images * s.channels : 0)), d1(static_cast<size_t>(first ? s.images * s.hidden : 0));
  Floats share(static_cast<size_t>(t.dx != nullptr ? s.images * s.channels : 0));
  std::unique_ptr<const Layer> to_hidden, to_means;
  if (first)
    to_hidden = std::make_unique<Layer>(s.channels, s.hidden, transposed(t.weight2, s.channels, s.hidden).data(), nullptr, kNone);
  if (t.dx != nullptr)
    to_means = std::make_unique<Layer>(s.hidden, s.channels, transposed(t.weight1, s.hidden, s.channels).data(), nullptr, kNone);
  Sums sums{};
  sums.dy = t.dy;
  sums.x = t.x;
  sums.mask = t.mask;
  sums.mask_ld = mask_stride(s.channels);
  for_images(s, [&](const Images& images) {
    const int64_t n = images.begin, count = images.end - images.begin;
    if (layers) {
      for_sums(images, s, sums, [&](int64_t image, int64_t c, double sum) {
        const double gate = t.gate[image * s.channels + c];
        d2[image * s.channels + c] = static_cast<float>(sum * gate * (1.0 - gate));
      });
    }
    if (first) {
      to_hidden->run(&d2[n * s.channels], count, &d1[n * s.hidden], images.threads());
      for (int64_t i = n * s.hidden; i < images.end * s.hidden; ++i)
        if (t.hidden[i] <= 0.0f) d1[i] = 0.0f;
    }
    if (t.dx != nullptr) {
      to_means->run(&d1[n * s.hidden], count, &share[n * s.channels], images.threads());
      for (int64_t i = n * s.channels; i < images.end * s.channels; ++i) share[i] /= pixels;
    }
    if (t.dx == nullptr && t.dresidual == nullptr) return;
    for_pieces(images, s, [&](int64_t image, int64_t row, int64_t rows) {
      Gradient part{};
      part.dy = t.dy.from(row);
      if (t.mask != nullptr) part.mask = t.mask + row * mask_stride(s.channels);
      part.rows = rows;
      part.channels = s.channels;
      part.gate = t.gate + image * s.channels;
      if (t.dx != nullptr) {
        part.share = &share[image * s.channels];
        part.dx = t.dx + row * s.channels;
      }
      if (t.dresidual != nullptr) part.dresidual = t.dresidual + row * s.channels;
      kernels().gradient(part);
    });
  });
  layer_gradient(s, d2.data(), s.channels, t.hidden, s.hidden, t.dweight2, t.dbias2);
  layer_gradient(s, d1.data(), s.hidden, t.means, s.channels, t.dweight1, t.dbias1);
}

}  // namespace fb::squeeze_excite
