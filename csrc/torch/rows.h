// Maps as rows of channels, for the doors of ops that are trained.
#pragma once

#include "cpu/rows.h"

#include "door.h"

namespace fb::door {

// The map x of a call; converted copies of what is read live as long as this.
struct Rows {
  Ints sizes;
  int64_t channels, count;
  bool channels_last;
  std::vector<Map> owned;

  Rows(const char* op, const Tensor& x) : sizes(x.sizes().begin(), x.sizes().end()), channels_last(suggests_channels_last(x)) {
    check_tensor(op, "x", x, 4);
    channels = sizes[1];
    count = sizes[0] * sizes[2] * sizes[3];
  }

  void check_filled(const char* op) const {
    check(channels >= 1 && count >= 1, op, ": x has sizes [", sizes[0], ", ", sizes[1], ", ", sizes[2], ", ", sizes[3],
          "], none may be 0");
  }

  RowMap read(const char* op, const char* name, const Tensor& t) {
    check_tensor(op, name, t, 4);
    check(Ints(t.sizes().begin(), t.sizes().end()) == sizes, op, ": ", name, " has sizes ", sizes_text(t),
          ", expected those of x");
    owned.push_back(as_nhwc(t));
    return {owned.back().data, owned.back().ld};
  }

  RowMap read(const char* op, const char* name, const std::optional<Tensor>& t) {
    return t ? read(op, name, *t) : RowMap{nullptr, 0};
  }

  Tensor empty_mask(bool wanted) const {
    return empty_bytes({wanted ? count : 0, mask_stride(channels)});
  }

  const uint8_t* read_mask(const char* op, const Tensor& mask) const {
    check(mask.is_cpu() && mask.scalar_type() == torch::headeronly::ScalarType::Byte && mask.dim() == 2 && mask.is_contiguous() &&
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
