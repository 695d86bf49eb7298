// A row of pixels times panels of output channels, tile by tile, and the runs of k it adds up.
#include <algorithm>

#include "../ops.h"
#include "conv2d.h"

namespace fb::conv2d {

const Kernels& kernels(Isa isa) { return FB_TABLE_OF(isa); }

const Kernels& kernels(const OpSpec& spec) {
#if defined(__x86_64__)
  if (spec.bf16 != 0) return kAvx512Bf16;
#endif
  return kernels(isa());
}

std::vector<Segment> blocked_segments(const std::vector<Segment>& runs, int64_t max_block) {
  int64_t total = 0;
  for (const Segment& run : runs) total += run.length;
  const int64_t blocks = ceil_div(total, max_block);
  const int64_t block = ceil_div(total, blocks);
  std::vector<Segment> out;
  int64_t left = block;
  for (const Segment& run : runs) {
    int64_t done = 0;
    while (done < run.length) {
      const int64_t length = std::min(left, run.length - done);
      left -= length;
      out.push_back({run.offset + done, static_cast<int32_t>(length), left == 0 ? 1 : 0});
      if (left == 0) left = block;
      done += length;
    }
  }
  out.back().block_end = 1;
  return out;
}

Ahead first_of_next_step(const Pointers& x, const Worker& worker, int64_t begin, int64_t floats) {
  const int64_t all = x.next_weight_floats;
  begin = std::min(all, begin + (x.next_weight_in_parts ? all / worker.team * worker.index : 0));
  return {x.next_weight + begin, x.next_weight + std::min(begin + floats, all), nullptr, nullptr};
}

namespace {

// `rows` rows of a panel of a map into L2, to be read or written soon.
template <int kWrite>
void fetch_rows(const float* row, int64_t stride, int64_t rows, int64_t columns) {
  for (int64_t m = 0; m < rows; ++m, row += stride)
    for (int64_t line = 0; line < columns; line += 16) __builtin_prefetch(row + line, kWrite, 2);
}

}  // namespace

void multiply(const Kernels& kernels, Block& block) {
  Tile tile = block.tile;
  Ahead& ahead = block.ahead;
  const int64_t tiles = ceil_div(block.pixels, kernels.max_rows), lines = block.depth * 16;
  const auto rows_of = [&](int64_t i) { return (block.pixels + tiles - 1 - i) / tiles; };  // balanced: 49 = 13 + 12 + 12 + 12
  for (int64_t i = 0; i < tiles; ++i) {
    const int64_t rows = rows_of(i);
    for (int64_t panel = 0; panel < block.panels; ++panel) {
      Tile t = tile;
      const int64_t channel = panel * kernels.panel;
      t.b += channel * block.depth;
      t.y += channel;
      t.columns = std::min<int64_t>(kernels.panel, block.channels - channel);
      const int64_t activation = channel < block.plain_channels ? int64_t{kNone} : block.activation;
      t.activation = activation <= kRelu6 ? activation : int64_t{kNone};
      if (t.scale != nullptr) t.scale += channel;
      if (t.bias != nullptr) t.bias += channel;
      if (t.gate != nullptr) t.gate += channel;
      if (t.residual != nullptr) t.residual += channel;
      t.next_b = ahead.weights < ahead.weights_end ? ahead.weights : t.b;
      t.next_a = panel == 0 && ahead.input < ahead.input_end ? ahead.input : t.b;
      if (t.next_b == ahead.weights) ahead.weights += lines;
      if (t.next_a == ahead.input) ahead.input += lines;
      if (block.into_map && i + 1 < tiles) {
        fetch_rows<1>(t.y + rows * t.y_stride, t.y_stride, rows_of(i + 1), t.columns);
        if (t.residual != nullptr) fetch_rows<0>(t.residual + rows * t.residual_stride, t.residual_stride, rows_of(i + 1), t.columns);
      }
      (2 * t.columns <= kernels.panel ? kernels.narrow : kernels.tile)[rows](t);
      if (activation > kRelu6) kernels.activate(t.y, t.y_stride, rows, t.columns, activation);
    }
    tile.a += rows * tile.a_stride;
    tile.y += rows * tile.y_stride;
    if (tile.residual != nullptr) tile.residual += rows * tile.residual_stride;
  }
}

}  // namespace fb::conv2d
