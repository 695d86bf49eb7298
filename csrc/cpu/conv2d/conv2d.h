// Register tiles shared by every dense convolution: 1x1, k x k, stem, linear, and the products inside Winograd.
//
// Tiles of bfloat16 multiply pairs of channels: a word is then two of them in the place of one float, the lower channel in the lower
// half, and a pixel's channels are filled up with a zero when their number is odd. All sizes of input and weights are in words.
#pragma once

#include <cstdint>
#include <vector>

#include "../activation.h"
#include "../isa.h"
#include "../op.h"

namespace fb::conv2d {

// Two numbers, rounded to the nearest bfloat16, ties to even.
float pair_word(float low, float high);

// A run of consecutive input words of one output pixel; consecutive in the packed weights too.
struct Segment {
  int64_t offset;  // from the pixel's base, in words
  int32_t length;
  int32_t block_end;  // 1: the partial sum is added to the total after this run (runs form blocks of bounded length)
};

// Partial sums cover at most this many products, and are added up in order: the error stays that of a short sum. On all-positive data
// blocks of 512 have up to 4 times the error of PyTorch's NCHW convolution, 256 twice, 128 at most 1.6 times; 128 is no slower. Winograd's
// transforms add errors of their own, so its sums are shorter: 64 has at most 1.4 times the error.
constexpr int64_t kMaxBlock = 128;
constexpr int64_t kMaxWinogradBlock = 64;
constexpr int64_t kMaxPairsBlock = 256;  // of bfloat16 pairs: their own rounding is larger by far

struct Tile {
  const float* a;         // row m of the tile reads a + m * a_stride + segment.offset ...
  int64_t a_stride;
  const Segment* segments;
  int64_t segment_count;
  const float* b;         // packed panel: [sum of segment lengths][panel]
  const float* scale;     // `columns` floats or null
  const float* bias;      // `columns` floats or null
  const float* gate;      // `columns` floats or null
  const float* residual;  // row m at residual + m * residual_stride, or null
  int64_t residual_stride;
  float* y;               // row m at y + m * y_stride
  int64_t y_stride;
  int64_t columns;        // valid columns, 1..panel
  int64_t activation;     // none, relu or relu6
  // Memory wanted soon, by the next tiles and tasks: one cache line of each is fetched into L2 per step of k.
  // (Half a line per step, spread over the whole task, was 3 % slower on resnext50, batch 1.)
  const float* next_b;
  const float* next_a;
};

// A row of output pixels from planes, see planar.h: y[q, k] = act( (sum_i x[offsets[i] + q] * weight[i, k]) * scale[k] + bias[k] ), the
// products in order. Reads whole vectors: up to 31 floats behind the last pixel's.
struct PlanarRow {
  const float* x;
  const int64_t* offsets;  // of the taps
  int64_t taps;
  const float* weight;     // ldw floats from tap to tap
  int64_t ldw;
  const float* scale;      // or null
  const float* bias;       // or null
  int64_t activation;      // none, relu or relu6
  float* y;
  int64_t ldy;
  int64_t pixels;
};
constexpr int64_t kPlanarFilters = 8;

struct Kernels {
  int panel;                         // output channels per packed panel
  int max_rows;                      // tallest tile
  int channels_per_word;             // 1: float32, 2: bfloat16
  void (*const* tile)(const Tile&);    // tile[rows], rows 1..max_rows
  void (*const* narrow)(const Tile&);  // the same for half a panel of columns at most
  // In place: `rows` rows of `columns` floats, `stride` floats apart.
  void (*activate)(float* y, int64_t stride, int64_t rows, int64_t columns, int64_t activation);
  // out = activation(x * scale + shift), in words; pixels `step` floats apart in x, `out_step` words in out; scale and shift may be
  // null. x may be out where a word is a float and the steps are the same.
  void (*change)(const float* x, int64_t step, int64_t pixels, int64_t channels, const float* scale, const float* shift, int64_t activation, float* out,
                 int64_t out_step);
  void (*const* planar)(const PlanarRow&);  // planar[output channels], 1..kPlanarFilters; float32 only
};

extern const Kernels kPortable, kAvx2, kAvx512, kAvx512Bf16;

const Kernels& kernels(Isa isa);
const Kernels& kernels(const OpSpec& spec);  // for the type that spec multiplies

// Whether an image in planes is best convolved to these few channels in vectors of pixels: the same bits, but full vectors.
bool is_planar(const OpSpec& spec);
std::unique_ptr<Op> make_planar(const OpSpec& spec);

// How far apart to lay pixels of so many words, for tiles that read several of them at once. A multiple of 4 KiB puts all into one set of
// the L1 cache: 1x1 convolutions from 1024 and 2048 channels were 1.15 times as slow.
inline int64_t spaced(int64_t words) { return words % 1024 == 0 ? words + 16 : words; }

inline int64_t words(const Kernels& kernels, int64_t channels) { return (channels + kernels.channels_per_word - 1) / kernels.channels_per_word; }

// Cuts consecutive runs into blocks of equal length, at most max_block products each. The cut depends on the total only.
std::vector<Segment> blocked_segments(const std::vector<Segment>& runs, int64_t max_block);

// What multiply fetches into L2 while it computes: consecutive floats, one line of each per step of k.
struct Ahead {
  const float *weights = nullptr, *weights_end = nullptr;
  const float *input = nullptr, *input_end = nullptr;
};

// Of the weights of the next step, `floats` from `begin` on, counted from where this thread will begin.
Ahead first_of_next_step(const Pointers& x, const Worker& worker, int64_t begin, int64_t floats);

// A row of pixels times a few panels of output channels. `tile` describes the first tile of the first panel, but for its activation.
struct Block {
  Tile tile;
  int64_t pixels;
  int64_t panels;
  int64_t channels;  // valid output channels from the first panel on; tile.columns is derived
  int64_t depth;     // products per output
  int64_t activation;      // any
  int64_t plain_channels;  // a multiple of the panel, 0 or less: so many channels, from the first panel on, get no activation
  bool into_map;     // y and the residual lie in maps, which may be far: the next tile's rows of them are fetched during this tile's products
  Ahead ahead;       // moves on by what was fetched
};

// Tiles of balanced height; for each, all panels: the tile's input stays in L1, output and residual are walked along the channels,
// which are next to each other. Across panels first would touch a few lines of every pixel, each in another page.
void multiply(const Kernels& kernels, Block& block);

}  // namespace fb::conv2d
