// dx, stride 2:
//   task = (image, block of rows)
//     for channel block
//       copy the rows of dy it reads, with zeros around                       stays in L1
//       for row                                                              grouped_conv2d_backward/generic.h
//
// dw: rows of dy are cut into runs, runs into chunks, whoever computes them; kRunsInFloat runs are added in float, and from there on all
// is added in double, in a fixed order.
//   task = (chunk, range of channel blocks)
//     for run of rows
//       for channel block
//         copy dy and the rows of x it sees; add their products to the sums of the block
#include "grouped_conv2d_backward.h"

#include <algorithm>
#include <vector>

#include "../grouped_conv2d/grouped_conv2d.h"
#include "../memory.h"
#include "../ops.h"

namespace fb::grouped_conv2d {

namespace {
const Kernels& forward_kernels() { return FB_TABLE_OF(isa()); }
}  // namespace

}  // namespace fb::grouped_conv2d

namespace fb::grouped_conv2d_backward {

namespace {

constexpr int64_t kCopyBytes = 28 * 1024;
constexpr int64_t kTaskProducts = 3 << 19;
constexpr int64_t kRunPixels = 196;  // summed in registers
constexpr int64_t kRunsInFloat = 8;
constexpr int64_t kSumBytes = 40 * 1024;   // of a task
constexpr int64_t kMostSums = 150 * 1000;  // of all chunks
constexpr int64_t kMostChunks = 32;

constexpr int64_t kStreamBytes = 16 << 20;  // larger maps do not wait in a cache for whoever reads them

const Kernels& kernels() { return FB_TABLE_OF(isa()); }

using grouped_conv2d::Copy;

int log2_of(int64_t value) { return value <= 1 ? 0 : 1 + log2_of(value / 2); }

void (*copy_of(int64_t group))(const Copy&) { return grouped_conv2d::forward_kernels().copy[log2_of(group)]; }

// The forward's layout with inputs and outputs of each group exchanged.
std::vector<float> exchanged(const OpSpec& spec, const float* weight) {
  const int64_t group = spec.c / spec.groups;
  std::vector<float> out(static_cast<size_t>(spec.k * group * 9));
  parallel_for(spec.c, spec.k * group * 9, [&](int64_t c) {
    const float* from = weight + (c / group * group * group + c % group) * 9;
    float* to = out.data() + c * group * 9;
    for (int64_t k = 0; k < group; ++k, from += group * 9, to += 9) std::copy_n(from, 9, to);
  });
  return out;
}

}  // namespace

std::string input_refusal(const OpSpec& spec) {
  if (spec.k != spec.c)
    return "gradient of x, " + std::to_string(spec.c) + " to " + std::to_string(spec.k) +
           " channels: grouped rows handle as many out as in";
  return "";
}

void input_gradient(const OpSpec& spec, const float* grad, int64_t ldg, const float* weight, float* dx) {
  const Kernels& own = kernels();
  const int64_t p = spec.p(), q = spec.q(), group = spec.c / spec.groups, block = std::max<int64_t>(group, own.lanes);
  void (*const copy)(const Copy&) = copy_of(group);
  void (*const input_row)(const InputRow&) = own.input_row[log2_of(group) - 2];

  OpSpec turned;
  turned.kind = "grouped_conv2d";
  turned.c = turned.k = spec.c;
  turned.groups = spec.groups;
  turned.r = turned.s = turned.h = turned.w = 3;
  AlignedFloats packed_memory;
  float* const packed = packed_memory.reserve(packed_floats(turned));
  pack_weight(turned, exchanged(spec, weight).data(), packed);

  const int64_t columns = 1 + (spec.w + spec.pad_w + 1) / 2 + own.pairs, row_floats = columns * block;
  const int64_t fitting = std::max<int64_t>(2, 2 * (kCopyBytes / 4 / row_floats - 1));
  const int64_t enough = ceil_div(kTaskProducts, std::max<int64_t>(1, q * spec.c * group * 9 / 2));
  const int64_t rows_of_task = std::min({fitting, round_up(enough, 2), spec.h}), blocks = ceil_div(spec.h, rows_of_task);
  const bool whole_lines = own.lanes == 16 && reinterpret_cast<uintptr_t>(dx) % 64 == 0;
  const bool stream = whole_lines && spec.n * spec.h * spec.w * spec.c * 4 >= kStreamBytes;
  parallel_for(spec.n * blocks, spec.n * p * q * spec.c * group * 9, [&](int64_t task) {
    const int64_t image = task / blocks, first = task % blocks * rows_of_task, end = std::min(spec.h, first + rows_of_task);
    const int64_t from = std::max<int64_t>(0, (first + spec.pad_h - 1) / 2), to = std::min(p, (end - 1 + spec.pad_h) / 2 + 1);
    AlignedFloats memory;
    float* const rows = memory.reserve(std::max<int64_t>(1, to - from) * row_floats);
    for (int64_t i = from; i < to; ++i) {
      float* const row = rows + (i - from) * row_floats;
      std::fill(row, row + block, 0.0f);
      std::fill(row + (1 + q) * block, row + row_floats, 0.0f);
    }
    InputRow row{};
    row.y_stride = spec.c;
    row.width = spec.w;
    row.pad = spec.pad_w;
    row.stream = stream;
    for (int64_t c = 0; c < spec.c; c += block) {
      for (int64_t i = from; i < to; ++i) {
        copy({grad + (image * p + i) * q * ldg + c, ldg, q, c + block < spec.c ? block : 0, nullptr, nullptr, kNone,
              rows + (i - from) * row_floats + block});
      }
      for (int64_t h = first; h < end; ++h) {
        row.rows = 0;
        for (int64_t r = 0; r < 3; ++r) {
          const int64_t up = h + spec.pad_h - r;
          if (up < 0 || up % 2 != 0 || up / 2 >= p) continue;
          row.grad[row.rows] = rows + (up / 2 - from) * row_floats;
          row.weight[row.rows++] = packed + (c * 3 + r * own.lanes) * 3 * group;
        }
        row.y = dx + (image * spec.h + h) * spec.w * spec.c + c;
        input_row(row);
      }
    }
  });
}

namespace {

// How dw is cut: by the sizes of the layer alone.
struct Cut {
  int64_t rows_of_run, runs_of_image, runs, runs_of_chunk, chunks;

  explicit Cut(const OpSpec& spec) {
    const int64_t p = spec.p(), q = spec.q(), block = std::max<int64_t>(16, spec.k / spec.groups);
    const int64_t fitting = (kCopyBytes / 4 / block - 2 * spec.w) / (spec.stride_h * spec.w + q);
    rows_of_run = std::clamp<int64_t>(std::min(kRunPixels / q, fitting), 1, p);
    rows_of_run = ceil_div(p, ceil_div(p, rows_of_run));
    runs_of_image = ceil_div(p, rows_of_run);
    runs = spec.n * runs_of_image;
    const int64_t most = std::clamp<int64_t>(kMostSums / (spec.k * spec.c / spec.groups * 9), 1, kMostChunks);
    runs_of_chunk = ceil_div(runs, most);
    chunks = ceil_div(runs, runs_of_chunk);
  }
};

}  // namespace

void weight_gradient(const OpSpec& spec, const float* grad, int64_t ldg, const Pointers& x, float* dw, const int64_t steps[4]) {
  const Kernels& own = kernels();
  const int64_t p = spec.p(), q = spec.q(), group = spec.c / spec.groups, filters = spec.k / spec.groups, lanes = own.lanes;
  const int64_t x_block = std::max(group, lanes), block = std::max(filters, lanes), blocks = spec.k / block;
  const int64_t per_x_block = x_block / group * filters / block;
  const int64_t block_sums = block * group * 9, all_sums = spec.k * group * 9;
  void (*const copy_grad)(const Copy&) = copy_of(filters);
  void (*const copy_x)(const Copy&) = copy_of(group);
  void (*const weight_rows)(const WeightRows&) =
      own.weight_rows[log2_of(filters / group)][log2_of(filters) - 2][spec.stride_h - 1];
  const Cut cut(spec);
  const int64_t blocks_of_part =
      std::clamp<int64_t>(kSumBytes / 4 / block_sums / per_x_block, 1, blocks / per_x_block) * per_x_block;
  const int64_t parts = ceil_div(blocks, blocks_of_part), x_rows = (cut.rows_of_run - 1) * spec.stride_h + 3;
  std::vector<double> totals(static_cast<size_t>(cut.chunks * all_sums));
  parallel_for(cut.chunks * parts, cut.runs * all_sums * 9, [&](int64_t task) {
    const int64_t chunk = task / parts, first_block = task % parts * blocks_of_part;
    const int64_t end_block = std::min(blocks, first_block + blocks_of_part), count = (end_block - first_block) * block_sums;
    AlignedFloats memory;
    float* const sums = memory.reserve(count + cut.rows_of_run * q * block + x_rows * spec.w * x_block);
    float *const grad_rows = sums + count, *const image_rows = grad_rows + cut.rows_of_run * q * block;
    double* const total = totals.data() + chunk * all_sums + first_block * block_sums;
    WeightRows t{};
    t.grad = grad_rows;
    t.x_step = spec.w * x_block;
    t.width = spec.w;
    t.pixels = q;
    t.pad = spec.pad_w;
    std::fill(sums, sums + count, 0.0f);
    const int64_t first_x = first_block / per_x_block * x_block;
    const int64_t first_run = chunk * cut.runs_of_chunk, end_run = std::min(cut.runs, first_run + cut.runs_of_chunk);
    for (int64_t run = first_run; run < end_run; ++run) {
      const int64_t image = run / cut.runs_of_image, row = run % cut.runs_of_image * cut.rows_of_run;
      t.rows = std::min(cut.rows_of_run, p - row);
      const int64_t top = row * spec.stride_h - spec.pad_h, from = std::max<int64_t>(0, top);
      const int64_t to = std::min(spec.h, top + (t.rows - 1) * spec.stride_h + 3);
      t.first = top - from;
      t.height = to - from;
      for (int64_t b = first_block; b < end_block; ++b) {
        // What is fetched into L2 meanwhile: the next block, or the first one of the next run.
        const int64_t x_from = b / per_x_block * x_block;
        const bool last = b + per_x_block >= end_block;
        const int64_t ahead = b + 1 < end_block ? block : run + 1 < end_run ? t.rows * q * ldg - (b - first_block) * block : 0;
        const int64_t x_ahead = !last               ? x_block
                                : run + 1 < end_run ? t.rows * spec.stride_h * spec.w * spec.ldx + first_x - x_from
                                                    : 0;
        copy_grad({grad + (image * p + row) * q * ldg + b * block, ldg, t.rows * q, ahead, nullptr, nullptr, kNone, grad_rows});
        if (b % per_x_block == 0) {
          const auto of_block = [&](const float* values) { return spec.pre != 0 ? values + x_from : nullptr; };
          copy_x({x.x + (image * spec.h + from) * spec.w * spec.ldx + x_from, spec.ldx, t.height * spec.w, x_ahead,
                  of_block(x.pre_scale), of_block(x.pre_shift), spec.pre_activation, image_rows});
        }
        t.x = image_rows + b % per_x_block * (lanes / std::min(filters, lanes));
        t.sums = sums + (b - first_block) * block_sums;
        weight_rows(t);
      }
      if ((run - first_run) % kRunsInFloat == kRunsInFloat - 1 || run == end_run - 1) {
        own.add(total, sums, count);
        std::fill(sums, sums + count, 0.0f);
      }
    }
  });
  const int64_t unit = std::max<int64_t>(1, lanes / filters);
  parallel_for(blocks, cut.chunks * all_sums, [&](int64_t b) {
    double* const sums = totals.data() + b * block_sums;
    for (int64_t chunk = 1; chunk < cut.chunks; ++chunk) {
      const double* const more = sums + chunk * all_sums;
      for (int64_t i = 0; i < block_sums; ++i) sums[i] += more[i];
    }
    const double* next = sums;
    for (int64_t k0 = b * block; k0 < (b + 1) * block; k0 += lanes) {
      int64_t at[16];
      for (int64_t lane = 0; lane < lanes; ++lane) at[lane] = (k0 + lane % unit * (lanes / unit) + lane / unit) * steps[0];
      for (int64_t r = 0; r < 3; ++r)
        for (int64_t c = 0; c < group; ++c)
          for (int64_t s = 0; s < 3; ++s) {
            float* const to = dw + c * steps[1] + r * steps[2] + s * steps[3];
            for (int64_t lane = 0; lane < lanes; ++lane) to[at[lane]] = static_cast<float>(*next++);
          }
    }
  });
}

}  // namespace fb::grouped_conv2d_backward
