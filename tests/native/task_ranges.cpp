// Checks what ops say about their tasks, on which the barrier-free runner relies: which pixels of x and of the residual a
// task reads (input_pixels, residual_pixels), and which tasks write given pixels of y (tasks_writing).
//
// Standard input has one op per line, "kind name=value ...". Every task runs alone: once on whole inputs and once with NaN
// outside the pixels it claims to read, and must write the same bits both times. Exit status 0: every claim held.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <iostream>
#include <map>
#include <sstream>
#include <string>
#include <vector>

#include "op.h"

namespace {

using Floats = std::vector<float>;

constexpr float kUntouched = 123456.0f;
int failures = 0;

void fail(const std::string& line, const std::string& text) {
  if (++failures <= 20) std::printf("%s\n  %s\n", line.c_str(), text.c_str());
}

Floats random_floats(int64_t size, uint32_t seed) {
  Floats out(static_cast<size_t>(size));
  for (float& x : out) {
    seed = seed * 1664525u + 1013904223u;
    x = static_cast<float>(static_cast<int>(seed >> 16) % 17 - 8);
  }
  return out;
}

// The pixels of `range` as they are, NaN everywhere else.
Floats only(const Floats& values, fb::Range range, int64_t channels) {
  Floats out(values.size(), NAN);
  const int64_t end = std::min<int64_t>(range.end, static_cast<int64_t>(values.size()) / channels);
  for (int64_t i = range.begin * channels; i < end * channels; ++i) out[i] = values[i];
  return out;
}

bool same_bits(const Floats& a, const Floats& b) { return std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0; }

fb::OpSpec parse(const std::string& line) {
  fb::OpSpec spec;
  const std::map<std::string, int64_t*> fields = {{"n", &spec.n},
                                                  {"h", &spec.h},
                                                  {"w", &spec.w},
                                                  {"c", &spec.c},
                                                  {"k", &spec.k},
                                                  {"r", &spec.r},
                                                  {"s", &spec.s},
                                                  {"stride_h", &spec.stride_h},
                                                  {"stride_w", &spec.stride_w},
                                                  {"pad_h", &spec.pad_h},
                                                  {"pad_w", &spec.pad_w},
                                                  {"pad_bottom", &spec.pad_bottom},
                                                  {"pad_right", &spec.pad_right},
                                                  {"dilation_h", &spec.dilation_h},
                                                  {"dilation_w", &spec.dilation_w},
                                                  {"groups", &spec.groups},
                                                  {"activation", &spec.activation},
                                                  {"ceil_mode", &spec.ceil_mode},
                                                  {"gated", &spec.gated},
                                                  {"act_from", &spec.act_from},
                                                  {"pre", &spec.pre},
                                                  {"pre_activation", &spec.pre_activation},
                                                  {"depth_activation", &spec.depth_activation},
                                                  {"count_include_pad", &spec.count_include_pad},
                                                  {"out_h", &spec.out_h},
                                                  {"out_w", &spec.out_w},
                                                  {"size", &spec.size},
                                                  {"tile", &spec.tile},
                                                  {"bf16", &spec.bf16},
                                                  {"real_points", &spec.real_points}};
  std::istringstream words(line);
  words >> spec.kind;
  for (std::string word; words >> word;) {
    const size_t equals = word.find('=');
    *fields.at(word.substr(0, equals)) = std::stoll(word.substr(equals + 1));
  }
  if (spec.kind == "local_response_norm") spec.alpha = 1e-4, spec.beta = 0.75, spec.offset = 1;
  return spec;
}

void check(const std::string& line) {
  const fb::OpSpec spec = parse(line);
  const auto op = fb::make_op(spec);
  const bool pooling = spec.kind == "max_pool2d" || spec.kind == "avg_pool2d" || spec.kind == "pad2d" || spec.kind == "l2_normalize" ||
                       spec.kind == "local_response_norm" || spec.kind == "layer_norm" || spec.kind == "group_norm" || spec.kind == "channel_shuffle" ||
                       spec.kind == "upsample_nearest2d" || spec.kind == "leaky_relu" || spec.kind == "multiply";
  const int64_t outputs = pooling ? spec.c : spec.k, y_pixels = spec.n * spec.p() * spec.q();
  const Floats x = random_floats(spec.n * spec.h * spec.w * spec.c, 1);
  const Floats residual = random_floats(y_pixels * outputs, 2);
  const Floats gate = random_floats(spec.n * outputs, 4), scale = random_floats(spec.c, 5), shift = random_floats(spec.c, 6);
  const Floats depth_weight = random_floats(spec.c * spec.r * spec.s, 7), depth_bias = random_floats(spec.c, 8);
  const bool separable = spec.kind == "separable_conv2d";
  Floats packed;
  if (!pooling) {
    packed.resize(static_cast<size_t>(fb::packed_floats(spec)));
    fb::pack_weight(spec, random_floats(spec.k * (spec.c / spec.groups) * (separable ? 1 : spec.r * spec.s), 3).data(), packed.data());
  }
  const auto run = [&](int64_t task, const Floats& input, const Floats& added, Floats& shared, Floats& y) {
    fb::Pointers pointers;
    pointers.x = input.data();
    pointers.weight = pooling ? nullptr : packed.data();
    pointers.residual = pooling && spec.kind != "multiply" ? nullptr : added.data();
    pointers.gate = spec.gated ? gate.data() : nullptr;
    pointers.pre_scale = spec.pre ? scale.data() : nullptr;
    pointers.pre_shift = spec.pre ? shift.data() : nullptr;
    pointers.depth_weight = separable ? depth_weight.data() : nullptr;  // packed or not: any weights will do
    pointers.depth_bias = separable ? depth_bias.data() : nullptr;
    pointers.y = y.data();
    pointers.shared = shared.data();
    Floats scratch(static_cast<size_t>(op->scratch_floats()) + 16, NAN);
    op->run(task, pointers, fb::Worker{scratch.data()});
  };

  Floats shared(static_cast<size_t>(op->shared_floats()), NAN), no_shared_change;
  for (int64_t task = 0; task < op->first_phase_tasks(); ++task) {
    Floats whole(shared.size(), kUntouched), part(shared.size(), kUntouched), y;
    run(task, x, residual, whole, y);
    run(task, only(x, op->input_pixels(task), spec.c), residual, part, y);
    if (!same_bits(whole, part)) fail(line, "first-phase task " + std::to_string(task) + " reads more of x than it says");
    for (size_t i = 0; i < shared.size(); ++i)
      if (whole[i] != kUntouched) shared[i] = whole[i];
  }
  Floats done(static_cast<size_t>(y_pixels * outputs), kUntouched);
  for (int64_t task = op->first_phase_tasks(); task < op->tasks(); ++task) {
    Floats whole(done.size(), kUntouched), part(done.size(), kUntouched);
    run(task, x, residual, shared, whole);
    run(task, only(x, op->input_pixels(task), spec.c), only(residual, op->residual_pixels(task), outputs), shared, part);
    if (!same_bits(whole, part)) fail(line, "task " + std::to_string(task) + " reads more of x or the residual than it says");
    for (int64_t pixel = 0; pixel < y_pixels; ++pixel) {
      bool writes = false;
      for (int64_t k = 0; k < outputs; ++k) {
        const size_t at = static_cast<size_t>(pixel * outputs + k);
        if (whole[at] == kUntouched) continue;
        writes = true;
        if (done[at] != kUntouched) fail(line, "task " + std::to_string(task) + " writes what another task wrote");
        done[at] = whole[at];
      }
      if (!writes) continue;
      for (const fb::Range pixels : {fb::Range{pixel, pixel + 1}, fb::Range{pixel / 2, pixel + 1}, fb::Range{pixel, y_pixels}}) {
        const fb::Range writers = op->tasks_writing(pixels);
        if (task < writers.begin || task >= writers.end)
          fail(line, "task " + std::to_string(task) + " writes pixel " + std::to_string(pixel) + " and tasks_writing forgets it");
      }
    }
  }
  for (const float value : done)
    if (value == kUntouched) return fail(line, "no task writes some of y");
}

}  // namespace

int main() {
  int count = 0;
  for (std::string line; std::getline(std::cin, line); ++count) check(line);
  std::printf("%d ops, %d failures\n", count, failures);
  return failures == 0 && count > 0 ? 0 : 1;
}
