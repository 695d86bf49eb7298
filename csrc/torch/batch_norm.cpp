// The doors of batch_norm and of its gradient: y = act((x - mean) / sqrt(var + eps) * weight + bias + residual).
#include "cpu/batch_norm/batch_norm.h"

#include <cmath>
#include <tuple>

#include "rows.h"

namespace {

using namespace fb::door;
using Doubles = std::vector<double>;

Tensor of_doubles(const Doubles& values) {
  const Tensor t = empty({static_cast<int64_t>(values.size())});
  for (size_t i = 0; i < values.size(); ++i) mutable_floats(t)[i] = static_cast<float>(values[i]);
  return t;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> batch_norm(const Tensor& x, const std::optional<Tensor>& weight,
                                                      const std::optional<Tensor>& bias, const std::optional<Tensor>& residual,
                                                      const std::optional<Tensor>& mean, const std::optional<Tensor>& var,
                                                      double eps, const std::string& activation, bool needs_mask) {
  constexpr const char* kOp = "batch_norm";
  Rows rows(kOp, x);
  rows.check_filled(kOp);
  check(mean.has_value() == var.has_value(), kOp, ": mean and var go together");
  const Floats scales = per_channel(kOp, "weight", weight, rows.channels, 1.0f);
  const Floats biases = per_channel(kOp, "bias", bias, rows.channels, 0.0f);
  fb::batch_norm::Apply t{};
  t.activation = check_activation(kOp, activation, fb::kRelu6);
  t.rows = rows.count;
  t.channels = rows.channels;
  t.x = rows.read(kOp, "x", x);
  t.residual = rows.read(kOp, "residual", residual);
  Doubles means(scales.size()), vars(scales.size());
  if (mean) {
    const Floats given = per_channel(kOp, "mean", mean, rows.channels, 0.0f),
                 given_var = per_channel(kOp, "var", var, rows.channels, 1.0f);
    means.assign(given.begin(), given.end());
    vars.assign(given_var.begin(), given_var.end());
  } else {
    fb::batch_norm::moments(t.x, t.rows, t.channels, means.data(), vars.data());
  }
  Doubles factors(scales.size());
  for (size_t c = 0; c < factors.size(); ++c) factors[c] = scales[c] / std::sqrt(vars[c] + eps);
  const Tensor centre = of_doubles(means), scale = of_doubles(factors);
  t.mean = floats(centre);
  t.scale = floats(scale);
  t.bias = biases.data();
  const Output y(rows.sizes, rows.channels_last);
  t.y = y.data();
  const bool masked = needs_mask && t.activation != fb::kNone;
  const Tensor mask = rows.empty_mask(masked);
  if (masked) t.mask = static_cast<uint8_t*>(mask.mutable_data_ptr());
  fb::batch_norm::apply(t);
  return {y.finish(), centre, of_doubles(vars), scale, mask};
}

Tensor batch_norm_again(const Tensor& x, const Tensor& mean, const Tensor& scale, const std::optional<Tensor>& bias,
                        const std::string& activation) {
  constexpr const char* kOp = "batch_norm_again";
  Rows rows(kOp, x);
  rows.check_filled(kOp);
  const Floats means = per_channel(kOp, "mean", mean, rows.channels, 0.0f), scales = per_channel(kOp, "scale", scale, rows.channels, 1.0f),
               biases = per_channel(kOp, "bias", bias, rows.channels, 0.0f);
  fb::batch_norm::Apply t{};
  t.activation = check_activation(kOp, activation, fb::kRelu6);
  t.rows = rows.count;
  t.channels = rows.channels;
  t.x = rows.read(kOp, "x", x);
  t.mean = means.data();
  t.scale = scales.data();
  t.bias = biases.data();
  const Output y(rows.sizes, rows.channels_last);
  t.y = y.data();
  fb::batch_norm::apply(t);
  return y.finish();
}

std::tuple<Tensor, Tensor, Tensor, Tensor> batch_norm_backward(const Tensor& grad, const Tensor& x,
                                                               const std::optional<Tensor>& mask,
                                                               const std::optional<Tensor>& weight, const Tensor& mean,
                                                               const Tensor& var, double eps, bool frozen, bool needs_x,
                                                               bool needs_affine, bool needs_residual) {
  constexpr const char* kOp = "batch_norm_backward";
  Rows rows(kOp, x);
  rows.check_filled(kOp);
  const Floats scales = per_channel(kOp, "weight", weight, rows.channels, 1.0f);
  const Floats means = per_channel(kOp, "mean", mean, rows.channels, 0.0f),
               vars = per_channel(kOp, "var", var, rows.channels, 1.0f);
  fb::batch_norm::Sums s{};
  s.rows = rows.count;
  s.channels = rows.channels;
  s.dy = rows.read(kOp, "grad", grad);
  s.x = rows.read(kOp, "x", x);
  if (mask) {
    s.mask = rows.read_mask(kOp, *mask);
    s.mask_ld = mask->size(1);
  }
  s.mean = means.data();
  const size_t channels = means.size();
  const bool centred = needs_x && !frozen;
  Doubles dz(channels), dz_x(channels), dweight(channels);
  if (centred || needs_affine) fb::batch_norm::sums(s, dz.data(), dz_x.data());
  Floats scale(channels), offset(channels), slope(channels);
  const auto count = static_cast<double>(rows.count);
  for (size_t c = 0; c < channels; ++c) {
    const double inverse = 1.0 / std::sqrt(vars[c] + eps);
    scale[c] = static_cast<float>(scales[c] * inverse);
    offset[c] = static_cast<float>(dz[c] / count);
    slope[c] = static_cast<float>(dz_x[c] * inverse * inverse / count);
    dweight[c] = dz_x[c] * inverse;
  }
  fb::batch_norm::Gradient t{};
  t.rows = s.rows;
  t.channels = s.channels;
  t.dy = s.dy;
  t.x = s.x;
  t.mask = s.mask;
  t.mean = means.data();
  t.scale = scale.data();
  t.offset = centred ? offset.data() : nullptr;
  t.slope = slope.data();
  std::optional<Output> dx, dresidual;
  if (needs_x) t.dx = dx.emplace(rows.sizes, rows.channels_last).data();
  if (needs_residual) t.dresidual = dresidual.emplace(rows.sizes, rows.channels_last).data();
  if (needs_x || needs_residual) fb::batch_norm::gradient(t);
  const Tensor none = empty({0});
  return {dx ? dx->finish() : none, needs_affine ? of_doubles(dweight) : none, needs_affine ? of_doubles(dz) : none,
          dresidual ? dresidual->finish() : none};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fast_backbones, CPU, m) {
  m.impl("batch_norm", TORCH_BOX(&batch_norm));
  m.impl("batch_norm_again", TORCH_BOX(&batch_norm_again));
  m.impl("batch_norm_backward", TORCH_BOX(&batch_norm_backward));
}
