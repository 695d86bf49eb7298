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

struct Affine {
  Doubles mean, var, scale;  // scale = weight / sqrt(var + eps)
};

// With the moments of the rows of x, or those given.
template <typename T>
Affine affine_of(const char* op, fb::RowsOf<T> x, const Rows<T>& rows, const std::optional<Tensor>& weight, const std::optional<Tensor>& mean,
                 const std::optional<Tensor>& var, double eps) {
  check(mean.has_value() == var.has_value(), op, ": mean and var go together");
  const Floats weights = per_channel(op, "weight", weight, rows.channels, 1.0f);
  Affine found{Doubles(weights.size()), Doubles(weights.size()), Doubles(weights.size())};
  if (mean) {
    const Floats given = per_channel(op, "mean", mean, rows.channels, 0.0f), given_var = per_channel(op, "var", var, rows.channels, 1.0f);
    found.mean.assign(given.begin(), given.end());
    found.var.assign(given_var.begin(), given_var.end());
  } else {
    fb::batch_norm::moments(x, rows.count, rows.channels, found.mean.data(), found.var.data());
  }
  for (size_t c = 0; c < weights.size(); ++c) found.scale[c] = weights[c] / std::sqrt(found.var[c] + eps);
  return found;
}

template <typename T>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> batch_norm_of(const Tensor& x, const std::optional<Tensor>& weight,
                                                      const std::optional<Tensor>& bias, const std::optional<Tensor>& residual,
                                                      const std::optional<Tensor>& mean, const std::optional<Tensor>& var,
                                                      double eps, const std::string& activation, bool needs_mask) {
  constexpr const char* kOp = "batch_norm";
  Rows<T> rows(kOp, x);
  rows.check_filled(kOp);
  const Floats biases = per_channel(kOp, "bias", bias, rows.channels, 0.0f);
  fb::batch_norm::Apply<T> t{};
  t.activation = check_activation(kOp, activation, fb::kRelu6);
  t.rows = rows.count;
  t.channels = rows.channels;
  t.x = rows.read(kOp, "x", x);
  t.residual = rows.read(kOp, "residual", residual);
  const Affine found = affine_of(kOp, t.x, rows, weight, mean, var, eps);
  const Tensor centre = of_doubles(found.mean), scale = of_doubles(found.scale);
  t.mean = floats(centre);
  t.scale = floats(scale);
  t.bias = biases.data();
  const MapOutput<T> y(rows.sizes, rows.channels_last);
  t.y = y.data();
  const bool masked = needs_mask && t.activation != fb::kNone;
  const Tensor mask = rows.empty_mask(masked);
  if (masked) t.mask = static_cast<uint8_t*>(mask.mutable_data_ptr());
  fb::batch_norm::apply(t);
  return {y.finish(), centre, of_doubles(found.var), scale, mask};
}

template <typename T>
std::tuple<Tensor, Tensor, Tensor, Tensor> batch_norm_affine_of(const Tensor& x, const std::optional<Tensor>& weight,
                                                             const std::optional<Tensor>& bias, const std::optional<Tensor>& mean,
                                                             const std::optional<Tensor>& var, double eps) {
  constexpr const char* kOp = "batch_norm_affine";
  Rows<T> rows(kOp, x);
  rows.check_filled(kOp);
  const Floats biases = per_channel(kOp, "bias", bias, rows.channels, 0.0f);
  const fb::RowsOf<T> read = mean ? fb::RowsOf<T>{nullptr, 0} : rows.read(kOp, "x", x);
  const Affine found = affine_of(kOp, read, rows, weight, mean, var, eps);
  Doubles shift(found.scale.size());
  for (size_t c = 0; c < shift.size(); ++c) shift[c] = biases[c] - found.mean[c] * found.scale[c];
  return {of_doubles(found.mean), of_doubles(found.var), of_doubles(found.scale), of_doubles(shift)};
}

template <typename T>
Tensor batch_norm_again_of(const Tensor& x, const Tensor& mean, const Tensor& scale, const std::optional<Tensor>& bias,
                        const std::string& activation) {
  constexpr const char* kOp = "batch_norm_again";
  Rows<T> rows(kOp, x);
  rows.check_filled(kOp);
  const Floats means = per_channel(kOp, "mean", mean, rows.channels, 0.0f), scales = per_channel(kOp, "scale", scale, rows.channels, 1.0f),
               biases = per_channel(kOp, "bias", bias, rows.channels, 0.0f);
  fb::batch_norm::Apply<T> t{};
  t.activation = check_activation(kOp, activation, fb::kRelu6);
  t.rows = rows.count;
  t.channels = rows.channels;
  t.x = rows.read(kOp, "x", x);
  t.mean = means.data();
  t.scale = scales.data();
  t.bias = biases.data();
  const MapOutput<T> y(rows.sizes, rows.channels_last);
  t.y = y.data();
  fb::batch_norm::apply(t);
  return y.finish();
}

template <typename T>
std::tuple<Tensor, Tensor, Tensor, Tensor> batch_norm_backward_of(const Tensor& grad, const Tensor& x,
                                                               const std::optional<Tensor>& mask,
                                                               const std::optional<Tensor>& weight, const Tensor& mean,
                                                               const Tensor& var, double eps, bool frozen, bool needs_x,
                                                               bool needs_affine, bool needs_residual,
                                                               const std::optional<Tensor>& scale_of_y,
                                                               const std::optional<Tensor>& shift_of_y, const std::string& activation,
                                                               const std::optional<Tensor>& added) {
  constexpr const char* kOp = "batch_norm_backward";
  Rows<T> rows(kOp, x);
  rows.check_filled(kOp);
  const Floats scales = per_channel(kOp, "weight", weight, rows.channels, 1.0f);
  const Floats means = per_channel(kOp, "mean", mean, rows.channels, 0.0f),
               vars = per_channel(kOp, "var", var, rows.channels, 1.0f);
  fb::batch_norm::Sums<T> s{};
  s.rows = rows.count;
  s.channels = rows.channels;
  s.dy = rows.read(kOp, "grad", grad);
  s.x = rows.read(kOp, "x", x);
  if (mask) s.passed.bits = rows.read_mask(kOp, *mask);
  s.passed.activation = check_activation(kOp, activation, fb::kRelu6);
  check(s.passed.activation == fb::kNone || (!mask && scale_of_y && shift_of_y), kOp,
        ": activation needs scale_of_y and shift_of_y, and no mask");
  const Floats y_scales = per_channel(kOp, "scale_of_y", scale_of_y, rows.channels, 1.0f),
               y_shifts = per_channel(kOp, "shift_of_y", shift_of_y, rows.channels, 0.0f);
  if (s.passed.activation != fb::kNone) {
    s.passed.scale = y_scales.data();
    s.passed.shift = y_shifts.data();
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
  fb::batch_norm::Gradient<T> t{};
  t.rows = s.rows;
  t.channels = s.channels;
  t.dy = s.dy;
  t.x = s.x;
  t.passed = s.passed;
  t.added = rows.read(kOp, "added", added);
  t.mean = means.data();
  t.scale = scale.data();
  t.offset = centred ? offset.data() : nullptr;
  t.slope = slope.data();
  std::optional<MapOutput<T>> dx, dresidual;
  if (needs_x) t.dx = dx.emplace(rows.sizes, rows.channels_last).data();
  if (needs_residual) t.dresidual = dresidual.emplace(rows.sizes, rows.channels_last).data();
  if (needs_x || needs_residual) fb::batch_norm::gradient(t);
  return {dx ? dx->finish() : empty({0}), needs_affine ? of_doubles(dweight) : empty({0}),
          needs_affine ? of_doubles(dz) : empty({0}), dresidual ? dresidual->finish() : empty({0})};
}

auto batch_norm(const Tensor& x, const std::optional<Tensor>& weight, const std::optional<Tensor>& bias,
                const std::optional<Tensor>& residual, const std::optional<Tensor>& mean, const std::optional<Tensor>& var, double eps,
                const std::string& activation, bool needs_mask) {
  return by_element(x, [&](auto element) {
    return batch_norm_of<decltype(element)>(x, weight, bias, residual, mean, var, eps, activation, needs_mask);
  });
}

auto batch_norm_affine(const Tensor& x, const std::optional<Tensor>& weight, const std::optional<Tensor>& bias,
                       const std::optional<Tensor>& mean, const std::optional<Tensor>& var, double eps) {
  return by_element(x, [&](auto element) { return batch_norm_affine_of<decltype(element)>(x, weight, bias, mean, var, eps); });
}

Tensor batch_norm_again(const Tensor& x, const Tensor& mean, const Tensor& scale, const std::optional<Tensor>& bias,
                        const std::string& activation) {
  return by_element(x, [&](auto element) { return batch_norm_again_of<decltype(element)>(x, mean, scale, bias, activation); });
}

auto batch_norm_backward(const Tensor& grad, const Tensor& x, const std::optional<Tensor>& mask, const std::optional<Tensor>& weight,
                         const Tensor& mean, const Tensor& var, double eps, bool frozen, bool needs_x, bool needs_affine,
                         bool needs_residual, const std::optional<Tensor>& scale_of_y, const std::optional<Tensor>& shift_of_y,
                         const std::string& activation, const std::optional<Tensor>& added) {
  return by_element(x, [&](auto element) {
    return batch_norm_backward_of<decltype(element)>(grad, x, mask, weight, mean, var, eps, frozen, needs_x, needs_affine,
                                                     needs_residual, scale_of_y, shift_of_y, activation, added);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fast_backbones, CPU, m) {
  m.impl("batch_norm", TORCH_BOX(&batch_norm));
  m.impl("batch_norm_affine", TORCH_BOX(&batch_norm_affine));
  m.impl("batch_norm_again", TORCH_BOX(&batch_norm_again));
  m.impl("batch_norm_backward", TORCH_BOX(&batch_norm_backward));
}
