// The factory: checks an OpSpec in words, fills in its defaults, makes the Op.
#include "op.h"

#include <algorithm>
#include <atomic>
#include <limits>
#include <optional>
#include <stdexcept>

#include "isa.h"
#include "map_memory/map_memory.h"
#include "ops.h"
#include "runner.h"

namespace fb {

namespace {

int64_t pooled_size(int64_t in, int64_t kernel, int64_t stride, int64_t before, int64_t after, bool ceil_mode) {
  const int64_t room = before + in + after - kernel + (ceil_mode ? stride - 1 : 0);
  if (room < 0) return 0;
  int64_t out = room / stride + 1;
  if (ceil_mode && (out - 1) * stride >= before + in) --out;  // no window starts in the padding after the image
  return out;
}

int64_t convolved_size(int64_t padded, int64_t kernel, int64_t stride, int64_t dilation) {
  return (padded - dilation * (kernel - 1) - 1) / stride + 1;
}

bool is_pool(const OpSpec& spec) { return spec.kind == "max_pool2d" || spec.kind == "avg_pool2d"; }

bool is_convolution(const OpSpec& spec) {
  return spec.kind == "conv2d" || spec.kind == "winograd_conv2d" || spec.kind == "grouped_conv2d" ||
         spec.kind == "depthwise_conv2d" || spec.kind == "separable_conv2d" || spec.kind == "linear";
}

bool is_norm(const OpSpec& spec) { return spec.kind == "layer_norm" || spec.kind == "group_norm"; }

bool is_elementwise(const OpSpec& spec) {
  return spec.kind == "leaky_relu" || spec.kind == "multiply" || spec.kind == "channel_shuffle";
}

constexpr double kAloneWork = 1 << 19;          // flops plus bytes: about 5 us
constexpr int64_t kLargest = int64_t{1} << 31;  // of any single size: products of three still fit int64 comfortably

std::string check_sizes(const OpSpec& spec) {
  const std::pair<const char*, int64_t> positive[] = {{"h", spec.h},
                                                      {"w", spec.w},
                                                      {"c", spec.c},
                                                      {"k", spec.k},
                                                      {"r", spec.r},
                                                      {"s", spec.s},
                                                      {"stride_h", spec.stride_h},
                                                      {"stride_w", spec.stride_w},
                                                      {"dilation_h", spec.dilation_h},
                                                      {"dilation_w", spec.dilation_w},
                                                      {"groups", spec.groups}};
  for (const auto& [name, value] : positive)
    if (value < 1 || value > kLargest) return std::string(name) + " is " + std::to_string(value) + ", expected 1 or more";
  if (spec.n < 0 || spec.n > kLargest) return "n is " + std::to_string(spec.n) + ", expected 0 or more";
  if (spec.pad_h < 0 || spec.pad_w < 0 || std::max({spec.pad_h, spec.pad_w, spec.bottom(), spec.right()}) > kLargest)
    return "padding is negative or too large";
  return "";
}

std::string activation_name(int64_t activation) {
  static const char* const names[] = {"none", "relu",        "relu6",     "sigmoid", "tanh",
                                      "silu", "hardsigmoid", "hardswish", "gelu",    "gelu_tanh"};
  return activation >= 0 && activation <= kLastActivation ? names[activation] : "number " + std::to_string(activation);
}

// What a kind can do besides its own arithmetic. Anything that is asked for and not listed is refused in words.
struct Features {
  int64_t last_activation = kNone, last_pre_activation = kNone;  // every activation up to this one
  bool gate = false, act_from = false, pre = false;
  bool uneven = false;  // other padding behind the image than in front
  bool bf16 = false;
};

Features features(const OpSpec& spec) {
  if (spec.kind == "conv2d") return {kLastActivation, kTanh, true, true, true, true, true};
  if (spec.kind == "linear") return {kLastActivation, kNone, false, true, false, false, true};
  if (spec.kind == "depthwise_conv2d") return {kLastActivation, kRelu6, false, false, true, true};
  if (spec.kind == "separable_conv2d") return {kLastActivation, kRelu6, false, false, false, true, true};
  if (spec.kind == "grouped_conv2d") return {kLastActivation, kRelu6, false, false, true, true, true};
  if (spec.kind == "avg_pool2d") return {kRelu6, kNone, false, false, false, true};
  if (spec.kind == "winograd_conv2d") return {kLastActivation, kRelu6, false, false, true, false, true};
  if (is_convolution(spec)) return {kRelu6};
  if (spec.kind == "max_pool2d" || spec.kind == "pad2d") return {kNone, kNone, false, false, false, true};
  if (spec.kind == "affine") return {kLastActivation, kNone, true};
  return {};
}

std::string check_features(const OpSpec& spec) {
  const Features can = features(spec);
  if (spec.activation < 0 || spec.activation > can.last_activation)
    return "activation " + activation_name(spec.activation) + " is not one of " + spec.kind + "'s";
  if (spec.act_from != 0 && !can.act_from) return "applies its activation to all channels or to none";
  if (spec.gated != 0 && !can.gate) return "has no gate";
  if ((spec.bottom() != spec.pad_h || spec.right() != spec.pad_w) && !can.uneven) return "pads all sides alike";
  if (spec.depth_activation != kNone && spec.kind != "separable_conv2d") return "has no depthwise part";
  if (spec.pre != 0 && !can.pre) return "does not scale and shift its input";
  if (spec.pre_activation != kNone && can.last_pre_activation == kNone) return "has no activation on its input";
  if (spec.real_points != 0 && spec.kind != "winograd_conv2d") return "has no points to choose";
  if (spec.bf16 != 0 && !can.bf16) return "multiplies float32 only";
  if (spec.bf16 != 0 && !has_bf16()) return "no AVX512-BF16 here (" + std::string(isa_name(isa())) + ")";
  if (spec.bf16 != 0 && spec.nchw_in) return "planar input: bfloat16 tiles read NHWC";
  if (spec.pre_activation < 0 || spec.pre_activation > can.last_pre_activation)
    return "pre_activation " + activation_name(spec.pre_activation) + " is not one of " + spec.kind + "'s";
  return "";
}

std::string check(const OpSpec& spec) {
  if (std::string text = check_sizes(spec); !text.empty()) return text;
  if (std::string text = check_features(spec); !text.empty()) return text;
  if (spec.c % spec.groups != 0 || spec.k % spec.groups != 0)
    return "groups " + std::to_string(spec.groups) + " does not divide " + std::to_string(spec.c) + " input and " +
           std::to_string(spec.k) + " output channels";
  if (is_convolution(spec)) {
    const int64_t reach_h = spec.dilation_h * (spec.r - 1) + 1, reach_w = spec.dilation_w * (spec.s - 1) + 1;
    if (spec.padded_h() < reach_h || spec.padded_w() < reach_w)
      return "kernel " + std::to_string(reach_h) + "x" + std::to_string(reach_w) + " is larger than the padded input " +
             std::to_string(spec.padded_h()) + "x" + std::to_string(spec.padded_w());
  }
  if (spec.kind == "winograd_conv2d") return winograd_conv2d_refusal(spec);
  if (spec.kind == "grouped_conv2d") return grouped_conv2d_refusal(spec);
  if (spec.kind == "depthwise_conv2d") return depthwise_conv2d_refusal(spec);
  if (spec.kind == "separable_conv2d") return separable_conv2d_refusal(spec);
  if (spec.kind == "max_pool2d") return max_pool2d_refusal(spec);
  if (spec.kind == "avg_pool2d") return avg_pool2d_refusal(spec);
  if (spec.kind == "local_response_norm") return local_response_norm_refusal(spec);
  if (spec.kind == "upsample_nearest2d") return upsample_nearest2d_refusal(spec);
  if (spec.kind == "affine" || spec.kind == "pad2d" || is_elementwise(spec) || is_norm(spec))
    return spec.k == spec.c ? "" : "k differs from c in " + spec.kind;
  if (spec.kind == "l2_normalize") return l2_normalize_refusal(spec);
  if (spec.kind == "squared_distances") return squared_distances_refusal(spec);
  if (spec.kind == "linear" && (spec.h != 1 || spec.w != 1 || spec.r != 1 || spec.s != 1)) return "linear has no spatial sizes";
  if (spec.kind == "conv2d" || spec.kind == "linear") return conv2d_refusal(spec);
  if (is_convolution(spec) || spec.kind == "global_avg_pool" || spec.kind == "to_nchw" || spec.kind == "to_nhwc") return "";
  return "unknown kind '" + spec.kind + "'";
}

OpSpec completed(OpSpec spec) {
  if (spec.ldx == 0) spec.ldx = spec.c;
  const int64_t out = is_convolution(spec) || spec.kind == "squared_distances" ? spec.k : spec.c;
  if (spec.ldy == 0) spec.ldy = out;
  if (spec.ldr == 0) spec.ldr = out;
  if (spec.ldg == 0) spec.ldg = out;
  return spec;
}

class Nothing final : public Op {  // an empty batch
 public:
  using Op::Op;
  int64_t tasks() const override { return 0; }
  void run(int64_t, const Pointers&, const Worker&) const override {}
};

}  // namespace

int64_t OpSpec::p() const {
  if (out_h > 0) return out_h;
  return is_pool(*this) ? pooled_size(h, r, stride_h, pad_h, bottom(), ceil_mode != 0)
                        : convolved_size(padded_h(), r, stride_h, dilation_h);
}

int64_t OpSpec::q() const {
  if (out_w > 0) return out_w;
  return is_pool(*this) ? pooled_size(w, s, stride_w, pad_w, right(), ceil_mode != 0)
                        : convolved_size(padded_w(), s, stride_w, dilation_w);
}

Range Op::input_pixels(int64_t) const { return {0, std::numeric_limits<int64_t>::max()}; }
Range Op::residual_pixels(int64_t) const { return {0, std::numeric_limits<int64_t>::max()}; }
Range Op::tasks_writing(Range pixels) const { return pixels.begin < pixels.end ? Range{0, tasks()} : Range{0, 0}; }

double Op::flops() const {
  if (spec_.kind == "squared_distances") return 2.0 * static_cast<double>(spec_.n * spec_.c * spec_.k);
  if (!is_convolution(spec_)) return 0.0;
  if (spec_.kind == "separable_conv2d")
    return 2.0 * static_cast<double>(spec_.n * spec_.p() * spec_.q() * spec_.c) *
           static_cast<double>(spec_.r * spec_.s + spec_.k);
  return 2.0 * static_cast<double>(spec_.n * spec_.p() * spec_.q() * spec_.k) *
         static_cast<double>(spec_.c / spec_.groups * spec_.r * spec_.s);
}

double Op::bytes() const {
  const double in = static_cast<double>(spec_.n * spec_.h * spec_.w * spec_.c);
  if (is_convolution(spec_)) {
    const double out = static_cast<double>(spec_.n * spec_.p() * spec_.q() * spec_.k);
    const double weight_bytes = spec_.bf16 ? 2.0 : 4.0;
    if (spec_.kind == "separable_conv2d") {
      return 4.0 * (in + out + static_cast<double>(spec_.c * spec_.r * spec_.s)) +
             weight_bytes * static_cast<double>(spec_.c * spec_.k);
    }
    return 4.0 * (in + out) + weight_bytes * static_cast<double>(spec_.k * (spec_.c / spec_.groups) * spec_.r * spec_.s);
  }
  if (spec_.kind == "multiply") return 12.0 * in;
  if (is_pool(spec_) || spec_.kind == "pad2d" || spec_.kind == "upsample_nearest2d")
    return 4.0 * (in + static_cast<double>(spec_.n * spec_.p() * spec_.q() * spec_.c));
  if (spec_.kind == "squared_distances") return 4.0 * (in + static_cast<double>((spec_.n + spec_.c) * spec_.k));
  if (spec_.kind == "global_avg_pool") return 4.0 * (in + static_cast<double>(spec_.n * spec_.c));
  return 8.0 * in;
}

void parallel_for(int64_t count, int64_t work, const std::function<void(int64_t)>& body) {
  constexpr int64_t kWorthwhile = 1 << 17;
  struct Loop {
    int64_t count;
    const std::function<void(int64_t)>& body;
    std::atomic<int64_t> next{0};
  } loop{count, body, {}};
  const auto run = [](void* context) {
    Loop& own = *static_cast<Loop*>(context);
    for (int64_t i = own.next.fetch_add(1); i < own.count; i = own.next.fetch_add(1)) own.body(i);
  };
  if (count == 1 || work < kWorthwhile) return run(&loop);
  parallel()(0, run, &loop);
}

std::string refusal(const OpSpec& spec) { return check(spec); }

std::unique_ptr<Op> make_op(const OpSpec& wanted) {
  if (const std::string text = check(wanted); !text.empty()) throw std::invalid_argument(wanted.kind + ": " + text);
  const OpSpec spec = completed(wanted);
  if (spec.n == 0) return std::make_unique<Nothing>(spec);
  if (spec.kind == "conv2d" || spec.kind == "linear") return make_conv2d(spec);
  if (spec.kind == "winograd_conv2d") return make_winograd_conv2d(spec);
  if (spec.kind == "grouped_conv2d") return make_grouped_conv2d(spec);
  if (spec.kind == "depthwise_conv2d") return make_depthwise_conv2d(spec);
  if (spec.kind == "separable_conv2d") return make_separable_conv2d(spec);
  if (spec.kind == "max_pool2d") return make_max_pool2d(spec);
  if (spec.kind == "avg_pool2d") return make_avg_pool2d(spec);
  if (spec.kind == "affine") return make_affine(spec);
  if (spec.kind == "pad2d") return make_pad2d(spec);
  if (spec.kind == "l2_normalize") return make_l2_normalize(spec);
  if (spec.kind == "squared_distances") return make_squared_distances(spec);
  if (spec.kind == "local_response_norm") return make_local_response_norm(spec);
  if (spec.kind == "layer_norm") return make_layer_norm(spec);
  if (spec.kind == "group_norm") return make_group_norm(spec);
  if (spec.kind == "channel_shuffle") return make_channel_shuffle(spec);
  if (spec.kind == "upsample_nearest2d") return make_upsample_nearest2d(spec);
  if (spec.kind == "leaky_relu") return make_leaky_relu(spec);
  if (spec.kind == "multiply") return make_multiply(spec);
  if (spec.kind == "global_avg_pool") return make_global_avg_pool(spec);
  if (spec.kind == "to_nchw") return make_to_nchw(spec);
  return make_to_nhwc(spec);
}

int64_t packed_floats(const OpSpec& spec) {
  if (const std::string text = check(spec); !text.empty()) throw std::invalid_argument(spec.kind + ": " + text);
  if (spec.kind == "winograd_conv2d") return winograd_conv2d_packed_floats(spec);
  if (spec.kind == "grouped_conv2d") return grouped_conv2d_packed_floats(spec);
  if (spec.kind == "depthwise_conv2d") return depthwise_conv2d_packed_floats(spec);
  if (spec.kind == "separable_conv2d") return separable_conv2d_packed_floats(spec);
  if (is_convolution(spec)) return conv2d_packed_floats(spec);
  if (spec.kind == "affine" || is_norm(spec)) return spec.c;
  if (spec.kind == "squared_distances") return spec.k * spec.c;
  throw std::invalid_argument(spec.kind + ": has no weight");
}

void pack_weight(const OpSpec& spec, const float* weight, float* out) {
  if (const std::string text = check(spec); !text.empty()) throw std::invalid_argument(spec.kind + ": " + text);
  if (spec.kind == "winograd_conv2d") return winograd_conv2d_pack(spec, weight, out);
  if (spec.kind == "grouped_conv2d") return grouped_conv2d_pack(spec, weight, out);
  if (spec.kind == "depthwise_conv2d") return depthwise_conv2d_pack(spec, weight, out);
  if (spec.kind == "separable_conv2d") return separable_conv2d_pack(spec, weight, out);
  if (is_convolution(spec)) return conv2d_pack(spec, weight, out);
  if (spec.kind == "affine" || is_norm(spec) || spec.kind == "squared_distances")
    return static_cast<void>(std::copy(weight, weight + packed_floats(spec), out));
  throw std::invalid_argument(spec.kind + ": has no weight");
}

void run_op(const OpSpec& spec, const Pointers& pointers, int threads) {
  TaskList list;
  list.add(make_op(spec), {});
  Pointers own = pointers;
  const int64_t floats = list.steps()[0].op->shared_floats();
  std::optional<map_memory::Floats> shared;  // fresh pages would cost more than some ops
  if (floats > 0) {
    own.shared = shared.emplace(floats).get();
    poison(own.shared, floats);
  }
  const Op& op = *list.steps()[0].op;
  const bool tiny = op.flops() + op.bytes() < kAloneWork;  // waking another thread would take longer
  list.run({own}, tiny ? 1 : threads);
}

}  // namespace fb
