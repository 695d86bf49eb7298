// An activation that is known when a call starts, as a constant for its loops. Included in a target region.
#pragma once

#include "../activation.h"

namespace {

template <int64_t kValue>
struct ActivationIs {
  static constexpr int64_t value = kValue;
};

// body(ActivationIs<...>) for none, ReLU or ReLU6.
template <typename Body>
FB_INLINE void by_activation(int64_t activation, const Body& body) {
  switch (activation) {
    case fb::kRelu:
      return body(ActivationIs<fb::kRelu>{});
    case fb::kRelu6:
      return body(ActivationIs<fb::kRelu6>{});
    default:
      return body(ActivationIs<fb::kNone>{});
  }
}

}  // namespace
