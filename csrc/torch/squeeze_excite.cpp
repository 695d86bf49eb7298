// The doors of squeeze_excite and of its gradient: y = act(x * gate + residual),
// gate = sigmoid(weight2 relu(weight1 mean(x) + bias1) + bias2).
#include "cpu/squeeze_excite/squeeze_excite.h"

#include <tuple>

#include "rows.h"

namespace {

using namespace fb::door;

void check_layer(const char* op, const char* name, const Tensor& weight, const char* bias_name, const std::optional<Tensor>& bias,
                 int64_t inputs) {
  check_tensor(op, name, weight, 2);
  check(weight.size(0) >= 1 && weight.size(1) == inputs, op, ": ", name, " has sizes ", sizes_text(weight), ", expected [any, ",
        inputs, "]");
  if (!bias) return;
  check_tensor(op, bias_name, *bias, 1);
  check(bias->size(0) == weight.size(0), op, ": ", bias_name, " has sizes ", sizes_text(*bias), ", expected [", weight.size(0),
        "]");
}

// Sizes of a call, its layers checked.
template <typename T>
fb::squeeze_excite::Sizes check_layers(const char* op, const Rows<T>& rows, const Tensor& weight1,
                                       const std::optional<Tensor>& bias1, const Tensor& weight2,
                                       const std::optional<Tensor>& bias2) {
  const int64_t pixels = rows.sizes[2] * rows.sizes[3];
  check(rows.channels >= 1 && pixels >= 1, op, ": x has ", rows.channels, " channels and ", pixels,
        " pixels, only the batch may be empty");
  check_layer(op, "weight1", weight1, "bias1", bias1, rows.channels);
  check_layer(op, "weight2", weight2, "bias2", bias2, weight1.size(0));
  check(weight2.size(0) == rows.channels, op, ": weight2 has sizes ", sizes_text(weight2), ", expected [", rows.channels, ", ",
        weight1.size(0), "]");
  return {rows.sizes[0], pixels, rows.channels, weight1.size(0)};
}

// [images, count], dense; a converted copy lives as long as the result.
Tensor check_kept(const char* op, const char* name, const Tensor& t, int64_t images, int64_t count) {
  check_tensor(op, name, t, 2);
  check(t.size(0) == images && t.size(1) == count, op, ": ", name, " has sizes ", sizes_text(t), ", expected [", images, ", ",
        count, "]");
  return torch::stable::contiguous(t);
}

template <typename T>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> squeeze_excite_of(const Tensor& x, const Tensor& weight1,
                                                                     const std::optional<Tensor>& bias1, const Tensor& weight2,
                                                                     const std::optional<Tensor>& bias2,
                                                                     const std::optional<Tensor>& residual,
                                                                     const std::string& activation, bool needs_mask) {
  constexpr const char* kOp = "squeeze_excite";
  Rows<T> rows(kOp, x);
  fb::squeeze_excite::Forward<T> t{};
  t.sizes = check_layers(kOp, rows, weight1, bias1, weight2, bias2);
  t.activation = check_activation(kOp, activation, fb::kRelu6);
  const Tensor means = empty({t.sizes.images, t.sizes.channels}), hidden = empty({t.sizes.images, t.sizes.hidden}),
               gate = empty({t.sizes.images, t.sizes.channels});
  const bool masked = needs_mask && t.activation != fb::kNone;
  const Tensor mask = rows.empty_mask(masked);
  const MapOutput<T> y(rows.sizes, rows.channels_last);
  t.x = rows.read(kOp, "x", x);
  t.residual = rows.read(kOp, "residual", residual);
  if (t.sizes.images == 0) return {y.finish(), means, hidden, gate, mask};
  const Tensor plain1 = torch::stable::contiguous(weight1), plain2 = torch::stable::contiguous(weight2);
  t.weight1 = floats(plain1);
  t.weight2 = floats(plain2);
  std::optional<Tensor> plain_bias1, plain_bias2;  // keep converted copies alive
  if (bias1) t.bias1 = floats(plain_bias1.emplace(torch::stable::contiguous(*bias1)));
  if (bias2) t.bias2 = floats(plain_bias2.emplace(torch::stable::contiguous(*bias2)));
  t.means = mutable_floats(means);
  t.hidden = mutable_floats(hidden);
  t.gate = mutable_floats(gate);
  t.y = y.data();
  if (masked) t.mask = static_cast<uint8_t*>(mask.mutable_data_ptr());
  fb::squeeze_excite::forward(t);
  return {y.finish(), means, hidden, gate, mask};
}

template <typename T>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> squeeze_excite_backward_of(
    const Tensor& grad, const Tensor& x, const std::optional<Tensor>& mask, const Tensor& weight1, const Tensor& weight2,
    const Tensor& means, const Tensor& hidden, const Tensor& gate, bool needs_x, bool needs_weight1, bool needs_bias1,
    bool needs_weight2, bool needs_bias2, bool needs_residual) {
  constexpr const char* kOp = "squeeze_excite_backward";
  Rows<T> rows(kOp, x);
  rows.check_filled(kOp);
  fb::squeeze_excite::Backward<T> t{};
  const auto [images, pixels, channels, inner] = t.sizes = check_layers(kOp, rows, weight1, std::nullopt, weight2, std::nullopt);
  const Tensor plain1 = torch::stable::contiguous(weight1), plain2 = torch::stable::contiguous(weight2);
  const Tensor plain_means = check_kept(kOp, "means", means, images, channels),
               plain_hidden = check_kept(kOp, "hidden", hidden, images, inner),
               plain_gate = check_kept(kOp, "gate", gate, images, channels);
  t.weight1 = floats(plain1);
  t.weight2 = floats(plain2);
  t.means = floats(plain_means);
  t.hidden = floats(plain_hidden);
  t.gate = floats(plain_gate);
  t.dy = rows.read(kOp, "grad", grad);
  if (needs_x || needs_weight1 || needs_bias1 || needs_weight2 || needs_bias2) t.x = rows.read(kOp, "x", x);
  if (mask) t.mask = rows.read_mask(kOp, *mask);
  const auto wanted = [](bool needed, const Ints& sizes, float*& data) {
    const Tensor gradient = empty(needed ? sizes : Ints{0});
    if (needed) data = mutable_floats(gradient);
    return gradient;
  };
  const Tensor dweight1 = wanted(needs_weight1, {inner, channels}, t.dweight1), dbias1 = wanted(needs_bias1, {inner}, t.dbias1),
               dweight2 = wanted(needs_weight2, {channels, inner}, t.dweight2),
               dbias2 = wanted(needs_bias2, {channels}, t.dbias2);
  std::optional<MapOutput<T>> dx, dresidual;
  if (needs_x) t.dx = dx.emplace(rows.sizes, rows.channels_last).data();
  if (needs_residual) t.dresidual = dresidual.emplace(rows.sizes, rows.channels_last).data();
  fb::squeeze_excite::backward(t);
  return {dx ? dx->finish() : empty({0}), dweight1, dbias1, dweight2, dbias2, dresidual ? dresidual->finish() : empty({0})};
}

auto squeeze_excite(const Tensor& x, const Tensor& weight1, const std::optional<Tensor>& bias1, const Tensor& weight2,
                    const std::optional<Tensor>& bias2, const std::optional<Tensor>& residual, const std::string& activation,
                    bool needs_mask) {
  return by_element(x, [&](auto element) {
    return squeeze_excite_of<decltype(element)>(x, weight1, bias1, weight2, bias2, residual, activation, needs_mask);
  });
}

auto squeeze_excite_backward(const Tensor& grad, const Tensor& x, const std::optional<Tensor>& mask, const Tensor& weight1,
                             const Tensor& weight2, const Tensor& means, const Tensor& hidden, const Tensor& gate, bool needs_x,
                             bool needs_weight1, bool needs_bias1, bool needs_weight2, bool needs_bias2, bool needs_residual) {
  return by_element(x, [&](auto element) {
    return squeeze_excite_backward_of<decltype(element)>(grad, x, mask, weight1, weight2, means, hidden, gate, needs_x,
                                                         needs_weight1, needs_bias1, needs_weight2, needs_bias2, needs_residual);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fast_backbones, CPU, m) {
  m.impl("squeeze_excite", TORCH_BOX(&squeeze_excite));
  m.impl("squeeze_excite_backward", TORCH_BOX(&squeeze_excite_backward));
}
