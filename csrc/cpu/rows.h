// Maps as rows of channels (the pixels of an NHWC map), as the ops of training read them.
#pragma once

#include <cstdint>

namespace fb {

template <typename T>
struct RowsOf {
  const T* data;  // null: absent
  int64_t ld;     // elements from row to row

  RowsOf from(int64_t row) const { return data == nullptr ? *this : RowsOf{data + row * ld, ld}; }
};

using RowMap = RowsOf<float>;

// Whether an activation passed its input: bit c % 8 of byte c / 8 of a row. Bytes from row to row:
constexpr int64_t mask_stride(int64_t channels) { return (channels + 15) / 16 * 2; }

}  // namespace fb
