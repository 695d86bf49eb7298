// Table of contents: the schema of every operator. The bodies are in the file of the same name, the fake kernels and the
// derivatives in kernels/<op>.py. No operator has an autograd key: call them through fast_backbones.kernels.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(fast_backbones, m) {
  // y = act(conv(x, weight) + bias + residual)
  m.def(
      "conv2d(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, int[] stride, int[] padding, int[] dilation, "
      "int groups, "
      "str activation) -> Tensor");
  m.def(
      "winograd_conv2d(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, int[] stride, int[] padding, int[] "
      "dilation, "
      "int groups, str activation) -> Tensor");
  m.def(
      "grouped_conv2d(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, int[] stride, int[] padding, int[] "
      "dilation, "
      "int groups, str activation) -> Tensor");
  // y = conv(act(x * scale + shift), weight) + bias, by the kernel of that name; padding is of the activated map
  m.def(
      "affine_conv2d(str kind, Tensor x, Tensor scale, Tensor shift, str pre_activation, Tensor weight, Tensor? bias, "
      "int[] stride, int[] padding, int[] dilation, int groups) -> Tensor");
  // [N, channels, H, W] for x [N, C, H, W], channels last, not initialised
  m.def("empty_map(Tensor x, int channels) -> Tensor");
  // weight [K, C/groups, R, S] to [C, K/groups, R, S], upside down: what convolves the gradient of y into that of x
  m.def("transposed_filters(Tensor weight, int groups) -> Tensor");
  // [N, C, height, width], channels last: small [N, C, P, Q] at every stride-th pixel, 0 between them, and `added`, if there is one
  m.def("spread_pixels(Tensor small, int height, int width, int[] stride, Tensor? added) -> Tensor");
  // y = act(conv1x1(depth_act(depthwise(x) + depth_bias)) + bias)
  m.def(
      "separable_conv2d(Tensor x, Tensor depth_weight, Tensor weight, Tensor? depth_bias, Tensor? bias, int[] stride, "
      "int[] padding, int[] dilation, str depth_activation, str activation) -> Tensor");
  m.def(
      "depthwise_conv2d(Tensor x, Tensor weight, Tensor? bias, int[] stride, int[] padding, int[] dilation, "
      "str activation) -> Tensor");
  // the gradient of weight, of one group, where conv2d has seen act((x - mean) * scale + bias), mean 0 where it is absent, or x
  m.def(
      "conv2d_backward_weight(Tensor grad, Tensor x, Tensor weight, int[] stride, int[] padding, int[] dilation, "
      "Tensor? mean, Tensor? scale, Tensor? bias, str activation) -> Tensor");
  // gradients of x and weight; empty where not needed
  m.def(
      "depthwise_conv2d_backward(Tensor grad, Tensor x, Tensor weight, int[] stride, int[] padding, int[] dilation, "
      "bool needs_x, bool needs_weight) -> (Tensor, Tensor)");
  // the same where the convolution has seen act(x * scale + shift), or x
  m.def(
      "grouped_conv2d_backward(Tensor grad, Tensor x, Tensor weight, int[] stride, int[] padding, int[] dilation, int groups, "
      "bool needs_x, bool needs_weight, Tensor? scale=None, Tensor? shift=None, str activation=\"none\") -> (Tensor, Tensor)");
  m.def("max_pool2d(Tensor x, int[] kernel_size, int[] stride, int[] padding, bool ceil_mode) -> Tensor");
  // the same, and which tap of each window was the largest, in bytes [N, P, Q, C]
  m.def("max_pool2d_taps(Tensor x, int[] kernel_size, int[] stride, int[] padding, bool ceil_mode) -> (Tensor y, Tensor taps)");
  m.def(
      "max_pool2d_backward(Tensor grad, Tensor taps, int height, int width, int[] kernel_size, int[] stride, int[] padding) -> Tensor");
  m.def(
      "avg_pool2d(Tensor x, int[] kernel_size, int[] stride, int[] padding, bool ceil_mode, bool count_include_pad) -> "
      "Tensor");
  m.def("global_avg_pool(Tensor x) -> Tensor");
  m.def("local_response_norm(Tensor x, int size, float alpha, float beta, float k) -> Tensor");
  m.def("l2_normalize(Tensor x, float eps) -> Tensor");
  m.def("squared_distances(Tensor x, Tensor centers) -> Tensor");
  // y = act(x * gate + residual), gate = sigmoid(weight2 hidden + bias2), hidden = relu(weight1 means + bias1); what backward needs of
  // these, and a bit for each element that the activation passed
  m.def(
      "squeeze_excite(Tensor x, Tensor weight1, Tensor? bias1, Tensor weight2, Tensor? bias2, Tensor? residual=None, "
      "str activation=\"none\", bool needs_mask=False) -> (Tensor y, Tensor means, Tensor hidden, Tensor gate, Tensor mask)");
  // gradients of x, weight1, bias1, weight2, bias2 and residual; empty where not needed
  m.def(
      "squeeze_excite_backward(Tensor grad, Tensor x, Tensor? mask, Tensor weight1, Tensor weight2, Tensor means, Tensor hidden, "
      "Tensor gate, bool needs_x, bool needs_weight1, bool needs_bias1, bool needs_weight2, bool needs_bias2, "
      "bool needs_residual) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def("linear(Tensor x, Tensor weight, Tensor? bias, str activation) -> Tensor");
  // y = act((x - mean) / sqrt(var + eps) * weight + bias + residual), with the moments of x or those given; which they were; weight /
  // sqrt(var + eps); and a bit for each element that the activation passed
  m.def(
      "batch_norm(Tensor x, Tensor? weight, Tensor? bias, Tensor? residual, Tensor? mean, Tensor? var, float eps, "
      "str activation, bool needs_mask) -> (Tensor y, Tensor mean, Tensor var, Tensor scale, Tensor mask)");
  // the same y from what that returned, without a residual
  m.def("batch_norm_again(Tensor x, Tensor mean, Tensor scale, Tensor? bias, str activation) -> Tensor");
  // mean, var, scale = weight / sqrt(var + eps) and shift = bias - mean * scale, with the moments of x or those given
  m.def(
      "batch_norm_affine(Tensor x, Tensor? weight, Tensor? bias, Tensor? mean, Tensor? var, float eps) -> (Tensor mean, "
      "Tensor var, Tensor scale, Tensor shift)");
  // gradients of x, weight, bias and residual; empty where not needed. Where the activation passed says mask, or, with an activation,
  // x * scale_of_y + shift_of_y. `added` is added to the gradient of x
  m.def(
      "batch_norm_backward(Tensor grad, Tensor x, Tensor? mask, Tensor? weight, Tensor mean, Tensor var, float eps, bool frozen, "
      "bool needs_x, bool needs_affine, bool needs_residual, Tensor? scale_of_y=None, Tensor? shift_of_y=None, "
      "str activation=\"none\", Tensor? added=None) -> (Tensor, Tensor, Tensor, Tensor)");
  // the loss, and what its gradient needs of each row beside the logits: the maximum and the sum of exponentials
  m.def(
      "softmax_cross_entropy(Tensor logits, Tensor target, Tensor? weight, float label_smoothing, int ignore_index, "
      "str reduction) -> (Tensor loss, Tensor kept)");
  m.def(
      "softmax_cross_entropy_backward(Tensor grad, Tensor logits, Tensor target, Tensor? weight, Tensor kept, "
      "float label_smoothing, int ignore_index, str reduction) -> Tensor");
}
