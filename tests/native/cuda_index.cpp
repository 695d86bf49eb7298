// Walks the index arithmetic of csrc/cuda/index.h on the CPU. Exit status 0 and no output: everything held.
#include "cuda/index.h"

#include <cstdio>
#include <cstdlib>
#include <vector>

using fb::cuda::Layout;

namespace {

[[noreturn]] void fail(const char* what, long long a, long long b) {
  std::fprintf(stderr, "%s: %lld, %lld\n", what, a, b);
  std::exit(1);
}

// Every item lands on a place inside the tensor, writes `vec` elements, and no element is written twice or left out.
template <Layout layout, int vec, typename Int>
void covers(int n, int p, int q, int c) {
  fb::cuda::PoolShape<Int> shape{};
  shape.n = Int(n), shape.c = Int(c), shape.p = Int(p), shape.q = Int(q);
  std::vector<int> written(size_t(n) * p * q * c, 0);
  const int64_t items = fb::cuda::pool_items(layout, n, p, q, c, vec);
  Int previous = 0;
  for (int64_t item = 0; item < items; ++item) {
    const auto at = fb::cuda::split<layout, vec>(Int(item), shape);
    if (at.n >= Int(n) || at.p >= Int(p) || at.q >= Int(q) || at.c + vec > Int(c)) fail("outside", item, vec);
    const Int start = fb::cuda::offset<layout>(at.n, at.p, at.q, at.c, Int(p), Int(q), Int(c));
    if (item > 0 && start != previous + vec) fail("neighbouring items are apart", item, (long long)start);
    previous = start;
    for (int v = 0; v < vec; ++v) ++written[size_t(start) + v];
  }
  for (size_t i = 0; i < written.size(); ++i) {
    if (written[i] != 1) fail("written other than once", (long long)i, written[i]);
  }
}

// The clipped window holds exactly the taps that fall inside the image.
template <typename Int>
void clips(int size, int stride, int pad, int limit, int outputs) {
  for (int out = 0; out < outputs; ++out) {
    const auto span = fb::cuda::window(Int(out), stride, pad, size, Int(limit));
    int count = 0, first = -1;
    for (int tap = 0; tap < size; ++tap) {
      const int at = out * stride + tap - pad;
      if (at < 0 || at >= limit) continue;
      if (first < 0) first = at;
      ++count;
    }
    if (int(span.end - span.begin) != count) fail("window has another length", out, count);
    if (count > 0 && int(span.begin) != first) fail("window starts elsewhere", out, first);
  }
}

// pooled() against a count: windows that start inside the image or its left padding, and in floor mode end inside the
// right padding too.
void counts(int size, int window, int stride, int pad) {
  if (size + 2 * pad < window) return;
  int floor = 0, ceil = 0;
  for (int start = -pad; start + window <= size + pad; start += stride) ++floor;
  ceil = floor;
  const int next = floor * stride - pad;
  const bool covered = (floor - 1) * stride + window - pad >= size + pad;
  if (!covered && next < size) ++ceil;
  if (fb::cuda::pooled(size, window, stride, pad, false) != floor) fail("floor mode", size, window);
  if (fb::cuda::pooled(size, window, stride, pad, true) != ceil) fail("ceil mode", size, window);
}

template <typename Int>
void everything() {
  const int shapes[][4] = {{1, 1, 1, 1}, {1, 1, 1, 8}, {3, 5, 7, 8}, {2, 1, 9, 24}, {1, 13, 1, 3}, {4, 2, 3, 40}, {0, 3, 3, 8}};
  for (const auto& s : shapes) {
    covers<Layout::nchw, 1, Int>(s[0], s[1], s[2], s[3]);
    covers<Layout::nhwc, 1, Int>(s[0], s[1], s[2], s[3]);
    if (s[3] % 4 == 0) covers<Layout::nhwc, 4, Int>(s[0], s[1], s[2], s[3]);
    if (s[3] % 8 == 0) covers<Layout::nhwc, 8, Int>(s[0], s[1], s[2], s[3]);
  }
  for (int size = 1; size <= 7; ++size) {
    for (int stride = 1; stride <= 4; ++stride) {
      for (int pad = 0; pad <= size / 2; ++pad) {
        for (int limit = 1; limit <= 9; ++limit) clips<Int>(size, stride, pad, limit, limit + 2 * pad + 2);
        for (int limit = 1; limit <= 9; ++limit) counts(limit, size, stride, pad);
      }
    }
  }
}

}  // namespace

int main() {
  everything<uint32_t>();
  everything<int64_t>();
}
