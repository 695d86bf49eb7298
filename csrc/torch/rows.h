// Maps as rows of channels, for the doors of ops that are trained.
#pragma once

#include "cpu/element.h"
#include "cpu/rows.h"

#include "door.h"

namespace fb::door {

using torch::headeronly::ScalarType;

template <typename T>
inline constexpr ScalarType kScalarType = ScalarType::Float;
template <>
inline constexpr ScalarType kScalarType<Bfloat16> = ScalarType::BFloat16;
template <>
inline constexpr ScalarType kScalarType<Float16> = ScalarType::Half;

// body(T{}) for the type of the values of the map x; float where x is none of ours, which Rows refuses.
template <typename Body>
auto by_element(const Tensor& x, const Body& body) {
  const ScalarType type = x.defined() ? x.scalar_type() : ScalarType::Float;
  if (type == ScalarType::BFloat16) return body(Bfloat16{});
  if (type == ScalarType::Half) return body(Float16{});
  return body(float{});
}

// Output of door.h, for maps of any type.
template <typename T>
class MapOutput {
 public:
  MapOutput(const Ints& sizes, bool channels_last) : map_(empty(sizes, channels_last, kScalarType<T>)) {
    direct_ = sizes[0] == 0 || pixel_stride(map_) == sizes[1];
    if (!direct_) map_ = empty(sizes, true, kScalarType<T>);
  }
  T* data() const { return static_cast<T*>(map_.mutable_data_ptr()); }
  Tensor finish() const { return direct_ ? map_ : torch::stable::contiguous(map_); }

 private:
  Tensor map_;
  bool direct_;
};

template <>
class MapOutput<float> : public Output {
 public:
  using Output::Output;
};

// The map x of a call, of values of type T; converted copies of what is read live as long as this.
template <typename T>
struct Rows {
  Ints sizes;
  int64_t channels, count;
  bool channels_last;
  std::vector<Tensor> owned;

  Rows(const char* op, const Tensor& x) : sizes(x.sizes().begin(), x.sizes().end()), channels_last(suggests_channels_last(x)) {
    check_map(op, "x", x);
    channels = sizes[1];
    count = sizes[0] * sizes[2] * sizes[3];
  }

  void check_filled(const char* op) const {
    check(channels >= 1 && count >= 1, op, ": x has sizes [", sizes[0], ", ", sizes[1], ", ", sizes[2], ", ", sizes[3],
          "], none may be 0");
  }

  RowsOf<T> read(const char* op, const char* name, const Tensor& t) {
    check_map(op, name, t);
    check(t.scalar_type() == kScalarType<T>, op, ": ", name, " is of another type than x");
    check(Ints(t.sizes().begin(), t.sizes().end()) == sizes, op, ": ", name, " has sizes ", sizes_text(t),
          ", expected those of x");
    if constexpr (kScalarType<T> == ScalarType::Float) {
      const Map map = as_nhwc(t);
      owned.push_back(map.owner);
      return {map.data, map.ld};
    } else {
      const int64_t ld = pixel_stride(t);
      owned.push_back(ld != 0 ? t : torch::stable::contiguous(t, torch::headeronly::MemoryFormat::ChannelsLast));
      return {static_cast<const T*>(owned.back().const_data_ptr()), ld != 0 ? ld : channels};
    }
  }

  RowsOf<T> read(const char* op, const char* name, const std::optional<Tensor>& t) {
    return t ? read(op, name, *t) : RowsOf<T>{nullptr, 0};
  }

  Tensor empty_mask(bool wanted) const { return empty_bytes({wanted ? count : 0, mask_stride(channels)}); }

  const uint8_t* read_mask(const char* op, const Tensor& mask) const {
    check(mask.is_cpu() && mask.scalar_type() == ScalarType::Byte && mask.dim() == 2 && mask.is_contiguous() &&
              mask.size(0) == count && mask.size(1) == mask_stride(channels),
          op, ": mask has sizes ", sizes_text(mask), ", expected bytes [", count, ", ", mask_stride(channels), "] in one piece");
    return static_cast<const uint8_t*>(mask.const_data_ptr());
  }
};

using Floats = std::vector<float>;

// One value for each channel; `otherwise` where there is no tensor.
inline Floats per_channel(const char* op, const char* name, const std::optional<Tensor>& t, int64_t channels, float otherwise) {
  if (!t) return Floats(static_cast<size_t>(channels), otherwise);
  check_tensor(op, name, *t, 1);
  check(t->size(0) == channels, op, ": ", name, " has sizes ", sizes_text(*t), ", expected [", channels, "]");
  const Tensor plain = torch::stable::contiguous(*t);
  return Floats(floats(plain), floats(plain) + channels);
}

}  // namespace fb::door
