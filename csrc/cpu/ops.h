// What the factory (op.cpp) knows of each op, and small integer helpers.
#pragma once

#include <functional>
#include <memory>

#include "op.h"

namespace fb {

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// Calls body(i) for every i below count, on the host library's threads when the work, in simple steps, is worth it.
void parallel_for(int64_t count, int64_t work, const std::function<void(int64_t)>& body);

std::unique_ptr<Op> make_conv2d(const OpSpec& spec);
std::string conv2d_refusal(const OpSpec& spec);
int64_t conv2d_packed_floats(const OpSpec& spec);
void conv2d_pack(const OpSpec& spec, const float* weight, float* out);

std::unique_ptr<Op> make_winograd_conv2d(const OpSpec& spec);
std::string winograd_conv2d_refusal(const OpSpec& spec);
int64_t winograd_conv2d_packed_floats(const OpSpec& spec);
void winograd_conv2d_pack(const OpSpec& spec, const float* weight, float* out);

std::unique_ptr<Op> make_grouped_conv2d(const OpSpec& spec);
std::string grouped_conv2d_refusal(const OpSpec& spec);
int64_t grouped_conv2d_packed_floats(const OpSpec& spec);
void grouped_conv2d_pack(const OpSpec& spec, const float* weight, float* out);

std::unique_ptr<Op> make_depthwise_conv2d(const OpSpec& spec);
std::string depthwise_conv2d_refusal(const OpSpec& spec);
int64_t depthwise_conv2d_packed_floats(const OpSpec& spec);
void depthwise_conv2d_pack(const OpSpec& spec, const float* weight, float* out);

std::unique_ptr<Op> make_separable_conv2d(const OpSpec& spec);
std::string separable_conv2d_refusal(const OpSpec& spec);
int64_t separable_conv2d_packed_floats(const OpSpec& spec);
void separable_conv2d_pack(const OpSpec& spec, const float* weight, float* out);

std::string pooling_refusal(const OpSpec& spec);  // what the pools share
std::unique_ptr<Op> make_max_pool2d(const OpSpec& spec);
std::string max_pool2d_refusal(const OpSpec& spec);
std::unique_ptr<Op> make_avg_pool2d(const OpSpec& spec);
std::string avg_pool2d_refusal(const OpSpec& spec);
std::unique_ptr<Op> make_global_avg_pool(const OpSpec& spec);
std::unique_ptr<Op> make_affine(const OpSpec& spec);
std::unique_ptr<Op> make_pad2d(const OpSpec& spec);
std::unique_ptr<Op> make_l2_normalize(const OpSpec& spec);
std::string l2_normalize_refusal(const OpSpec& spec);
std::unique_ptr<Op> make_squared_distances(const OpSpec& spec);
std::string squared_distances_refusal(const OpSpec& spec);
std::unique_ptr<Op> make_local_response_norm(const OpSpec& spec);
std::string local_response_norm_refusal(const OpSpec& spec);
std::unique_ptr<Op> make_layer_norm(const OpSpec& spec);
std::unique_ptr<Op> make_group_norm(const OpSpec& spec);
std::unique_ptr<Op> make_channel_shuffle(const OpSpec& spec);
std::unique_ptr<Op> make_upsample_nearest2d(const OpSpec& spec);
std::string upsample_nearest2d_refusal(const OpSpec& spec);
std::unique_ptr<Op> make_leaky_relu(const OpSpec& spec);
std::unique_ptr<Op> make_multiply(const OpSpec& spec);
std::unique_ptr<Op> make_to_nchw(const OpSpec& spec);
std::unique_ptr<Op> make_to_nhwc(const OpSpec& spec);

}  // namespace fb
